"""Pipeline stages: a part of the shards, no shard yet, and mlx-lm's own pipeline."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
import torch
import transformers
from mlx_lm.models import qwen3_5
from safetensors.torch import save_file

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from support.checkpoints import Checkpoint
from support.loading import load, parameters, same_bits
from vllm_moe_compat.errors import CheckpointFileError, CompatError, SettingError
from vllm_moe_compat.expert_cache.install import containers

INDEX = "model.safetensors.index.json"
LAYER = re.compile(r"layers\.(\d+)\.")


@pytest.fixture(autouse=True)
def _applied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def number(name: str) -> int | None:
    found = None if name.startswith(("mtp", "model.visual")) else LAYER.search(name)
    return int(found[1]) if found else None


def write(checkpoint: Checkpoint, path: Path, *, piece: bool = True) -> Path:
    """Write two shards, the second with the last layers and a piece of the one before."""
    layers = {n for name in checkpoint.tensors if (n := number(name)) is not None}
    cut = (max(layers) + 1) // 2
    before = [name for name in checkpoint.tensors if number(name) == cut - 1]
    last = {name for name in checkpoint.tensors if (number(name) or 0) >= cut} | {
        *(before[1::2] if piece else ())
    }
    shards = {
        "model-00001-of-00002.safetensors": [n for n in checkpoint.tensors if n not in last],
        "model-00002-of-00002.safetensors": [n for n in checkpoint.tensors if n in last],
    }
    # Every stage has what is outside of layers, as mlx-lm's pipeline sees to.
    shared = [name for name in checkpoint.tensors if number(name) is None]
    shards["model-00003.safetensors"] = shared
    path.mkdir()
    weight_map: dict[str, str] = {}
    for file, names in shards.items():
        names = names if "03" in file else [name for name in names if name not in shared]
        save_file({n: checkpoint.tensors[n].contiguous() for n in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    (path / "config.json").write_text(json.dumps(checkpoint.config))
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def stage(path: Path, **arguments: Any) -> Any:
    """Load as mlx-lm's pipeline does."""
    model, _ = mlx_lm.utils.load_model(path, lazy=True, strict=False, **arguments)
    return model


CELLS = [
    ("qwen3_5_moe", "block FP8 128"),
    ("qwen3_5_moe", "MLX form"),
    ("qwen3_moe", "release"),
    ("deepseek_v3", "block FP8 with MTP"),
    ("deepseek_v3", "int4"),
]
MORE = [
    (family, form)
    for family in ("qwen3_5_moe", "qwen3_moe", "deepseek_v3", "glm4_moe", "qwen3_next")
    for form in ("saved", "combined", "block FP8", "per-channel FP8", "NVFP4")
]


@pytest.mark.parametrize(
    ("family", "form"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.full) for cell in MORE)]
)
def test_the_last_stage_has_its_layers_bit_for_bit(family: str, form: str, tmp_path: Path):
    cell = build(FAMILIES[family], FORM_BY_NAME[form])
    path = write(cell.checkpoint, tmp_path / "whole")
    wanted = parameters(load(path))
    (path / "model-00001-of-00002.safetensors").unlink()
    found = parameters(stage(path))
    layers = sorted({n for name in wanted if (n := number(name)) is not None})
    own = {
        name: array
        for name, array in wanted.items()
        if number(name) is None or number(name) >= (layers[-1] + 1) // 2  # type: ignore[operator]
    }
    assert len(own) < len(wanted)
    assert same_bits({name: found[name] for name in own}, own)


@pytest.mark.parametrize("form", ["release", "combined"])
def test_a_stage_keeps_experts_of_its_own_layers_on_disk(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cell = build(FAMILIES["qwen3_moe"], FORM_BY_NAME[form])
    path = write(cell.checkpoint, tmp_path / "whole", piece=False)
    hidden = mx.random.normal((1, 5, 64))
    wanted = load(path).layers[-1](hidden)
    (path / "model-00001-of-00002.safetensors").unlink()
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "60%")
    model = stage(path)
    assert [one.layer for one in containers(model)] == ["model.layers.1.mlp.switch_mlp"]
    assert mx.array_equal(model.layers[-1](hidden), wanted).item()


def test_a_strict_load_of_a_part_is_refused_as_ever(tmp_path: Path):
    cell = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"])
    path = write(cell.checkpoint, tmp_path / "whole")
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointFileError, match=r"model-00001-of-00002\.safetensors"):
        mlx_lm.utils.load_model(path, lazy=True)


def test_a_fault_of_the_part_that_is_there_is_one(tmp_path: Path):
    cell = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["per-expert"])
    cell.checkpoint.tensors = dict(cell.checkpoint.tensors)
    del cell.checkpoint.tensors["model.layers.1.mlp.experts.1.up_proj.weight"]
    path = write(cell.checkpoint, tmp_path / "whole")
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="experts"):
        stage(path)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3_5_moe", "saved"),
        ("qwen3_moe", "per-channel FP8"),
        ("deepseek_v3", "ModelOpt FP8"),
        ("qwen3_moe", "MLX form"),
    ],
)
def test_the_structure_is_had_before_any_shard_is(family: str, form: str, tmp_path: Path):
    """``sharded_load`` builds the model first, to find out which shards it needs."""
    cell = build(FAMILIES[family], FORM_BY_NAME[form])
    cell.write(tmp_path)
    wanted = parameters(load(tmp_path))
    for shard in tmp_path.glob("model*.safetensors"):
        shard.unlink()
    found = parameters(stage(tmp_path))
    assert found.keys() >= {name for name in wanted if name.endswith("weight")}


def test_a_config_that_cannot_be_right_is_refused_before_any_shard_is_there(tmp_path: Path):
    cell = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["saved"])
    cell.checkpoint.config = cell.checkpoint.config | {"num_experts": "four"}
    cell.write(tmp_path)
    with pytest.raises(CompatError, match="num_experts") as whole:
        load(tmp_path)
    for shard in tmp_path.glob("model*.safetensors"):
        shard.unlink()
    with pytest.raises(CompatError) as empty:
        stage(tmp_path)
    assert str(empty.value) == str(whole.value)


@pytest.mark.parametrize(
    "loader",
    [
        "sharded_load",
        pytest.param(
            "pipeline_load",
            marks=pytest.mark.needs("mlx_lm/models/qwen3_5.py", "PipelineMixin"),
        ),
    ],
)
def test_mlx_lms_loaders_of_groups(loader: str, demo_checkpoint: Any):
    """In a group of one process."""
    if loader == "pipeline_load" and not hasattr(qwen3_5.Qwen3_5TextModel, "pipeline"):
        with pytest.raises(ValueError, match="does not support pipelining"):
            mlx_lm.utils.pipeline_load(str(demo_checkpoint.path))
        return
    model, tokenizer = getattr(mlx_lm.utils, loader)(str(demo_checkpoint.path))
    text = mlx_lm.generate(
        model, tokenizer, demo_checkpoint.prompt, max_tokens=demo_checkpoint.max_tokens
    )
    assert text.strip() == demo_checkpoint.text.strip()


def test_a_cache_of_experts_is_for_pipelines_and_not_for_shards_of_experts(
    demo_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "25%")
    path = str(demo_checkpoint.path)
    with pytest.raises(SettingError, match=r"CACHE=25%.*layers\.\d.*_proj; set it to off to shard"):
        mlx_lm.utils.sharded_load(path)
    if hasattr(qwen3_5.Qwen3_5TextModel, "pipeline"):
        model, tokenizer = mlx_lm.utils.pipeline_load(path)
        assert containers(model)
        text = mlx_lm.generate(
            model, tokenizer, demo_checkpoint.prompt, max_tokens=demo_checkpoint.max_tokens
        )
        assert text.strip() == demo_checkpoint.text.strip()


STAGE = """
import sys, mlx.core as mx, mlx_lm.utils, numpy as np
from pathlib import Path
import vllm_moe_compat
vllm_moe_compat.apply()
group = mx.distributed.init(backend="ring", strict=True)
folder = Path(sys.argv[1]) / str(group.rank())
structure, _ = mlx_lm.utils.load_model(Path(sys.argv[1]) / "json", lazy=True, strict=False)
structure.model.pipeline(group)
model, _ = mlx_lm.utils.load_model(folder, lazy=True, strict=False)
model.model.pipeline(group)
assert (model.model.start_idx, model.model.end_idx) == (
    structure.model.start_idx, structure.model.end_idx
)
mx.eval(model.parameters())
logits = model(mx.array([list(range(3, 30))]))
np.save(Path(sys.argv[1]) / f"logits-{group.rank()}.npy", np.array(logits.astype(mx.float32)))
"""


@pytest.mark.full
def test_two_processes_each_with_its_shards(tmp_path: Path):
    """Over loopback, with MLX's ring: the logits are those of the whole model."""
    import numpy as np

    cell = build(FAMILIES["deepseek_v3"], FORM_BY_NAME["block FP8 with MTP"])
    whole = write(cell.checkpoint, tmp_path / "whole", piece=False)
    wanted = np.array(load(whole)(mx.array([list(range(3, 30))])))
    # Rank 0 has the last layers.
    for rank, absent in enumerate(("model-00001-of-00002", "model-00002-of-00002")):
        shutil.copytree(whole, tmp_path / str(rank))
        (tmp_path / str(rank) / f"{absent}.safetensors").unlink()
    shutil.copytree(whole, tmp_path / "json", ignore=shutil.ignore_patterns("*.safetensors"))
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for one in sockets:
        one.close()
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STAGE, str(tmp_path)],
            env={
                **os.environ,
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(tmp_path / "hosts.json"),
            },
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(240) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    for rank in range(2):
        found = np.load(tmp_path / f"logits-{rank}.npy")
        assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5
