"""Experts in packed forms that a module keeps, as wholes and one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_config

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from support import models
from support.checkpoints import Checkpoint
from support.loading import TOKENS, load, parameters, same_bits
from support.stored import bits
from vllm_moe_compat.checkpoint.headers import read_headers
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.execute.quantize import PackedBuild, SanitizedLoad
from vllm_moe_compat.execute.stored_tensors import StoredTensors
from vllm_moe_compat.expert_cache.install import containers
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.expert_cache.source import FileSource
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.plan.expert_cache import CacheSetting, divide
from vllm_moe_compat.plan.expert_layers import planned_experts
from vllm_moe_compat.plan.make import make
from vllm_moe_compat.plan.planned_load import read_headers_of
from vllm_moe_compat.plan.serving import serving
from vllm_moe_compat.plan.tensor_names import TensorNames

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.fixture(autouse=True)
def _hooks() -> Iterator[None]:
    with vllm_moe_compat.applied():
        yield


def gpt_oss(folder: Path) -> Path:
    return models.write_gpt_oss_mxfp4(folder / "model")


def minimax_m3(folder: Path) -> Path:
    """Its matrices as E4M3 with an exponent per 32 columns."""
    made = build(FAMILIES["minimax_m3_vl"], FORM_BY_NAME["release"]).checkpoint
    tensors: dict[str, torch.Tensor] = {}
    for name, value in made.tensors.items():
        inside = ".layers." in name and name.endswith((".w1.weight", ".w2.weight", ".w3.weight"))
        if not (inside or name.endswith(("q_proj.weight", "o_proj.weight"))):
            tensors[name] = value.to(torch.bfloat16)
            continue
        packed, scales = mx.quantize(mx.array(value.float().numpy()), 32, 8, mode="mxfp8")
        octets = torch.from_numpy(np.array(packed.view(mx.uint8)))
        tensors[name] = octets.view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.from_numpy(np.array(scales))
    config = json.loads(json.dumps(made.config))
    config["quantization_config"] = {"quant_method": "mxfp8"}
    return Checkpoint(tensors, config).write(folder / "model")


WRITTEN = {"gpt_oss": gpt_oss, "minimax_m3_vl": minimax_m3}


@pytest.mark.parametrize("family", WRITTEN)
def test_each_expert_can_be_read_by_itself(family: str, tmp_path: Path):
    folder = WRITTEN[family](tmp_path)
    wanted = parameters(load(folder))
    builds: list[PackedBuild] = []
    names = TensorNames()

    def arrange(sanitized: SanitizedLoad, model: Any) -> None:
        nonlocal names
        names = sanitized.load.plan.names
        builds.extend(sanitized.builds)

    with loading_with(arrange=arrange):
        assert same_bits(parameters(load(folder)), wanted)
    paths = {
        name.rpartition(".")[0].rpartition(".")[0]
        for name in wanted
        if name.endswith(".scales") and _is_routed(name)
    }
    assert paths
    files = StoredTensors(folder, names.of(read_headers(folder)), names)
    for path in paths:
        mine = [b for b in builds if all(name.startswith(f"{path}.") for name in b.names)]
        parts = {
            n.removeprefix(f"{path}."): a for n, a in wanted.items() if n.startswith(f"{path}.")
        }
        made = {n.removeprefix(f"{path}.") for b in mine for n in b.names}
        assert made == parts.keys()
        specs = {name: Spec(tuple(a.shape[1:]), a.dtype) for name, a in parts.items()}
        source = FileSource(files, path, mine, specs)
        before = files.bytes_read
        for expert in range(source.experts):
            slot = {n: np.empty(a[0].nbytes, np.uint8) for n, a in parts.items()}
            assert source.read([expert], lambda _, slot=slot: slot) == {}
            for name, array in parts.items():
                assert slot[name].tobytes() == bits(array[expert]).tobytes(), name
        assert files.bytes_read - before == source.experts * source.nbytes


def _is_routed(name: str) -> bool:
    return any(f".{part}." in name for part in ("switch_mlp", "experts"))


@pytest.mark.parametrize("family", WRITTEN)
def test_a_cache_of_them_gives_the_bits_of_all(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = WRITTEN[family](tmp_path)
    wanted = load(folder)(mx.array([TOKENS]))
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "60%")
    model = load(folder)
    assert containers(model)
    assert mx.array_equal(model(mx.array([TOKENS])), wanted).item()


@pytest.mark.parametrize("family", WRITTEN)
def test_inspect_and_the_load_say_the_same_of_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = WRITTEN[family](tmp_path)
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "60%")
    outcome = inspect(folder)
    assert outcome.findings == []
    held = sum(one.nbytes for one in containers(load(folder)))
    planned = make(read_headers_of(folder), load_config(folder), serving("cpu"))
    whole = planned_experts(planned, "none", "cpu")
    assert CacheSetting.read() is not None
    assert divide(whole.layers, whole.per_token, CacheSetting.read()).nbytes == held


def test_they_are_not_quantised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = minimax_m3(tmp_path)
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "4bit")
    with pytest.raises(CompatError, match="VLLM_MOE_COMPAT_QUANTIZE"):
        load(folder)
