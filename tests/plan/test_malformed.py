"""A broken checkpoint is refused in one sentence, and nothing is half-applied.

Every fault of the tensors is tried twice: in files, where ``load_config`` must
stop before a tensor is read, and in a dict given straight to ``sanitize``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
import torch
from safetensors.torch import save_file

import vllm_moe_compat
from support.agreement import check_agreement
from support.checkpoints import PREFIX, PROJECTIONS, Checkpoint, Fp8, build
from support.loading import load, new_model, read
from vllm_moe_compat.errors import (
    CheckpointFileError,
    CompatError,
    LayoutError,
    UnsupportedCheckpointError,
)

Break = Callable[[Checkpoint], None]
EXPERTS = f"{PREFIX}layers.0.mlp.experts"
FIRST = f"{EXPERTS}.0.gate_proj.weight"
ATTENTION = f"{PREFIX}layers.3.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _hooks():
    with vllm_moe_compat.applied():
        yield


def remove(*parts: str) -> Break:
    """Remove the tensors whose names hold all the parts."""

    def run(checkpoint: Checkpoint) -> None:
        gone = [n for n in checkpoint.tensors if "mtp." not in n and all(p in n for p in parts)]
        assert gone
        for name in gone:
            del checkpoint.tensors[name]

    return run


def change(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    def run(checkpoint: Checkpoint) -> None:
        checkpoint.tensors[name] = value(checkpoint.tensors[name])

    return run


def several(*breaks: Break) -> Break:
    def run(checkpoint: Checkpoint) -> None:
        for one in breaks:
            one(checkpoint)

    return run


def configure(**values: Any) -> Break:
    def run(checkpoint: Checkpoint) -> None:
        checkpoint.config["text_config"].update(values)

    return run


def add(name: str, value: torch.Tensor) -> Break:
    def run(checkpoint: Checkpoint) -> None:
        checkpoint.tensors[name] = value

    return run


def add_combined(checkpoint: Checkpoint) -> None:
    checkpoint.tensors[f"{EXPERTS}.gate_up_proj"] = torch.zeros(4, 64, 64).bfloat16()
    checkpoint.tensors[f"{EXPERTS}.down_proj"] = torch.zeros(4, 64, 32).bfloat16()


def without_block(checkpoint: Checkpoint) -> None:
    del checkpoint.config["quantization_config"]["weight_block_size"]


SMALL_BLOCK = Fp8((16, 64))
TENSORS: dict[str, tuple[str, Fp8 | None, Break, type[CompatError], list[str]]] = {
    "gap in the indices": (
        "per-expert",
        Fp8(),
        remove(".experts.2."),
        LayoutError,
        ["layers.0…3.mlp.experts", "non-contiguous", "0…1,3", "0…3"],
    ),
    "gap in the indices of bf16": (
        "per-expert",
        None,
        remove("layers.1", ".experts.0."),
        LayoutError,
        ["layers.1.mlp.experts", "non-contiguous", "1…3"],
    ),
    "fewer experts than the config says": (
        "per-expert",
        Fp8(),
        remove(".experts.3."),
        LayoutError,
        ["experts 0…2", "experts 0…3 by the config"],
    ),
    "more experts than the config says": (
        "per-expert",
        Fp8(),
        configure(num_experts=3),
        LayoutError,
        ["experts 0…3", "experts 0…2 by the config"],
    ),
    "combined experts fewer than the config says": (
        "combined",
        None,
        several(configure(num_experts=8)),
        LayoutError,
        ["gate_up_proj", "4 experts", "8 by the config"],
    ),
    "a projection missing for one expert": (
        "per-expert",
        Fp8(),
        remove("layers.2", ".experts.1.up_proj"),
        LayoutError,
        ["layers.2.mlp.experts.1.up_proj.weight is missing"],
    ),
    "a projection missing for all": (
        "per-expert",
        Fp8(),
        remove(".experts.", "down_proj"),
        LayoutError,
        ["layers.0…3.mlp.experts.*.down_proj.weight is missing for all experts"],
    ),
    "combined without down_proj": (
        "combined",
        None,
        remove(".experts.down_proj"),
        LayoutError,
        ["experts.down_proj is missing"],
    ),
    "an expert of another shape": (
        "per-expert",
        None,
        change(FIRST, lambda t: t[:-8]),
        LayoutError,
        [FIRST, "BF16 [24, 64]", "BF16 [32, 64]"],
    ),
    "an expert of another dtype": (
        "per-expert",
        None,
        change(FIRST, lambda t: t.float()),
        LayoutError,
        [FIRST, "F32 [32, 64]", "BF16 [32, 64]"],
    ),
    "one expert not quantised": (
        "per-expert",
        Fp8(),
        several(
            change(FIRST, lambda t: t.bfloat16()),
            remove(f"{FIRST}_scale_inv"),
        ),
        LayoutError,
        [FIRST, "BF16", "F8_E4M3"],
    ),
    "a scale of another dtype": (
        "per-expert",
        Fp8(),
        change(f"{FIRST}_scale_inv", lambda t: t.float()),
        LayoutError,
        [f"{FIRST}_scale_inv", "F32", "BF16"],
    ),
    "an expert's FP8 weight without a scale": (
        "per-expert",
        Fp8(),
        remove(".experts.1.up_proj.weight_scale_inv"),
        LayoutError,
        ["layers.0…3.mlp.experts.1.up_proj.weight", "without a scale", "weight_scale_inv"],
    ),
    "an FP8 weight without a scale": (
        "combined",
        Fp8(),
        remove(f"{ATTENTION}_scale_inv"),
        LayoutError,
        [ATTENTION, "without a scale"],
    ),
    "combined FP8 without a scale": (
        "combined",
        Fp8(),
        remove("experts.gate_up_proj_scale_inv"),
        LayoutError,
        ["layers.0…3.mlp.experts.gate_up_proj", "gate_up_proj_scale_inv"],
    ),
    "a scale without its weight": (
        "combined",
        Fp8(),
        lambda c: c.tensors.pop(ATTENTION),
        LayoutError,
        [f"{ATTENTION}_scale_inv", "a weight that is missing"],
    ),
    "a scale beside a weight that is not FP8": (
        "combined",
        Fp8(),
        change(ATTENTION, lambda t: t.bfloat16()),
        LayoutError,
        [f"{ATTENTION}_scale_inv", "BF16"],
    ),
    "a grid of another block": (
        "per-expert",
        SMALL_BLOCK,
        change(f"{ATTENTION}_scale_inv", lambda t: t[:4]),
        LayoutError,
        [f"{ATTENTION}_scale_inv", "[4, 1]", "[16, 1]", "16x64"],
    ),
    "a grid that is transposed": (
        "combined",
        SMALL_BLOCK,
        change(f"{EXPERTS}.gate_up_proj_scale_inv", lambda t: t.transpose(1, 2)),
        LayoutError,
        ["gate_up_proj_scale_inv", "[4, 1, 4]", "[4, 4, 1]"],
    ),
    "grids that fit only a block that the config does not name": (
        "per-expert",
        SMALL_BLOCK,
        without_block,
        LayoutError,
        ["weight_block_size", "128x128"],
    ),
    "both layouts at once": (
        "per-expert",
        None,
        add_combined,
        LayoutError,
        ["layers.0.mlp", "twice", "per-expert, combined"],
    ),
    "per-expert beside MLX form": (
        "per-expert",
        None,
        add(f"{PREFIX}layers.0.mlp.switch_mlp.up_proj.weight", torch.zeros(4, 32, 64)),
        LayoutError,
        ["layers.0.mlp.experts", "repeats", "layers.0.mlp.switch_mlp"],
    ),
    "a layer under two prefixes": (
        "per-expert",
        None,
        add("model.layers.0.mlp.experts.0.up_proj.weight", torch.zeros(32, 64)),
        LayoutError,
        ["layers.0.mlp", "repeats"],
    ),
    "gate and up of different shapes": (
        "per-expert",
        None,
        lambda c: [
            change(n, lambda t: t[:16])(c) for n in list(c.tensors) if ".up_proj.weight" in n
        ],
        LayoutError,
        ["up_proj.weight", "[16, 64]", "[32, 64]"],
    ),
    "experts of another width than the model": (
        "per-expert",
        None,
        lambda c: [
            change(n, lambda t: t[:, :32])(c)
            for n in list(c.tensors)
            if ".experts." in n and ("gate_proj" in n or "up_proj" in n)
        ],
        LayoutError,
        ["gate_proj.weight", "[32, 32]", "[*, 64]"],
    ),
    "combined that fit neither way round": (
        "combined",
        None,
        change(f"{EXPERTS}.down_proj", lambda t: t[:, :32]),
        LayoutError,
        ["down_proj", "[4, 32, 32]", "[4, 64, 32]"],
    ),
    "a projection of an unknown name": (
        "per-expert",
        None,
        add(f"{EXPERTS}.0.side_proj.weight", torch.zeros(32, 64).bfloat16()),
        UnsupportedCheckpointError,
        ["side_proj", "unknown", "gate_proj, up_proj, down_proj"],
    ),
    "packed experts": (
        "per-expert",
        None,
        add(f"{EXPERTS}.0.gate_proj.qweight", torch.zeros(32, 8, dtype=torch.int32)),
        LayoutError,
        [f"{EXPERTS}.0.gate_proj.qweight", f"repeats the weight {FIRST}"],
    ),
    "experts at another path": (
        "per-expert",
        None,
        lambda c: [
            c.tensors.__setitem__(n.replace(".mlp.experts", ".moe.experts"), c.tensors.pop(n))
            for n in list(c.tensors)
            if ".mlp.experts" in n
        ],
        UnsupportedCheckpointError,
        ["layers.0…3.moe.experts", "mlp.experts"],
    ),
    "a scale of another kind": (
        "combined",
        Fp8(),
        change(f"{ATTENTION}_scale_inv", lambda t: t.to(torch.int32)),
        UnsupportedCheckpointError,
        [f"{ATTENTION}_scale_inv", "I32"],
    ),
    "one scale per channel of another weight": (
        "per-expert",
        Fp8(),
        change(f"{ATTENTION}_scale_inv", lambda t: torch.ones(96, 1)),
        LayoutError,
        [f"{ATTENTION}_scale_inv", "[96, 1]"],
    ),
    "an FP8 vector": (
        "combined",
        Fp8(),
        several(
            change(f"{PREFIX}norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
            add(f"{PREFIX}norm.weight_scale_inv", torch.ones(1)),
        ),
        UnsupportedCheckpointError,
        ["norm.weight", "[64]"],
    ),
    "a count of experts that is no number": (
        "per-expert",
        None,
        configure(num_experts="four"),
        UnsupportedCheckpointError,
        ["config.json", "num_experts", "'four'"],
    ),
}
# What a dict cannot tell: MLX has bf16 and FP8 dtypes of its own, and the block
# of a nested config is outside the model's arguments. What upstream splits by itself
# is not judged before it does.
NOT_IN_A_DICT = {
    "grids that fit only a block that the config does not name",
    "combined experts fewer than the config says",
    "combined that fit neither way round",
}
NO_MODEL = {"a count of experts that is no number"}


@pytest.mark.parametrize("fault", TENSORS)
def test_a_fault_is_named_before_a_tensor_is_read(fault: str, tmp_path: Path, monkeypatch):
    form, fp8, damage, error, parts = TENSORS[fault]
    checkpoint = build(form, fp8, mtp=True)
    damage(checkpoint)
    checkpoint.write(tmp_path)
    monkeypatch.setattr(mx, "load", None)
    with pytest.raises(error) as caught:
        mlx_lm.utils.load_model(tmp_path)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.endswith(".")
    assert "\n" not in message
    check_agreement(tmp_path, [], message)


@pytest.mark.parametrize("fault", [f for f in TENSORS if f not in NOT_IN_A_DICT | NO_MODEL])
def test_sanitize_called_directly_refuses_it_too_and_leaves_the_dict(fault: str, tmp_path: Path):
    form, fp8, damage, error, parts = TENSORS[fault]
    checkpoint = build(form, fp8, mtp=True)
    damage(checkpoint)
    checkpoint.config["text_config"]["quantization_config"] = checkpoint.config.get(
        "quantization_config", {}
    )
    checkpoint.write(tmp_path)
    weights = read(tmp_path)
    before = {name: id(value) for name, value in weights.items()}
    with pytest.raises(error) as caught:
        new_model(checkpoint.config).sanitize(weights)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert {name: id(value) for name, value in weights.items()} == before


def test_experts_in_a_dense_model_are_named(tmp_path: Path):
    checkpoint = build(dense=True)
    checkpoint.tensors[FIRST] = torch.zeros(32, 64)
    checkpoint.write(tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match=r"experts\.0.* dense"):
        load(tmp_path)


@pytest.mark.parametrize("block", ["128", [128], [0, 128], [128, 128.0], {"rows": 128}, [[1], 2]])
def test_a_block_that_means_nothing_is_named(block: Any, tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    checkpoint.config["quantization_config"]["weight_block_size"] = block
    checkpoint.write(tmp_path)
    with pytest.raises(LayoutError, match=r"config\.json: weight_block_size"):
        load(tmp_path)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_same_fault_in_every_layer_is_one_folded_name(projection: str, tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    remove(f".experts.1.{projection}")(checkpoint)
    checkpoint.write(tmp_path)
    with pytest.raises(LayoutError, match=rf"layers\.0…3\.mlp\.experts\.1\.{projection}"):
        load(tmp_path)


def test_after_a_refusal_a_sound_checkpoint_loads(tmp_path: Path):
    broken, sound = build(fp8=Fp8()), build(fp8=Fp8())
    remove(".experts.2.")(broken)
    with pytest.raises(LayoutError):
        load(broken.write(tmp_path / "broken"))
    load(sound.write(tmp_path / "sound"))


# Files


def written(tmp_path: Path, **kwargs: Any) -> Path:
    return build(fp8=Fp8(), **kwargs).write(tmp_path)


def index_of(path: Path) -> tuple[Path, dict[str, Any]]:
    file = path / "model.safetensors.index.json"
    return file, json.loads(file.read_text())


@pytest.mark.parametrize("kept", [0, 4, 200, 5000])
def test_a_truncated_shard_is_named(kept: int, tmp_path: Path):
    shard = written(tmp_path) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(CheckpointFileError, match=r"^model-00002-of-00002\.safetensors: "):
        load(tmp_path)


def test_a_shard_that_lacks_its_last_byte_is_named(tmp_path: Path):
    shard = written(tmp_path) / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointFileError, match="model-00001-of-00002"):
        load(tmp_path)


def test_a_corrupt_header_is_named(tmp_path: Path):
    shard = written(tmp_path) / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[8:40] = b"\xff" * 32
    shard.write_bytes(data)
    with pytest.raises(CheckpointFileError, match="not a readable safetensors file"):
        load(tmp_path)


def test_a_page_of_html_in_place_of_a_shard_is_named(tmp_path: Path):
    (written(tmp_path) / "model-00001-of-00002.safetensors").write_text("<html>404</html>" * 40)
    with pytest.raises(CheckpointFileError, match="download the checkpoint again"):
        load(tmp_path)


def test_a_folder_in_place_of_a_shard_is_named(tmp_path: Path):
    (written(tmp_path) / "model-00003.safetensors").mkdir()
    with pytest.raises(CheckpointFileError, match="model-00003"):
        load(tmp_path)


def test_a_shard_that_the_index_names_and_is_not_there(tmp_path: Path):
    (written(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointFileError, match=r"index\.json.*00002.*no such file"):
        load(tmp_path)


def test_a_tensor_that_the_index_claims_and_the_shard_lacks(tmp_path: Path):
    file, index = index_of(written(tmp_path))
    index["weight_map"][f"{PREFIX}layers.9.weight"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointFileError, match=r"layers\.9\.weight.*does not hold"):
        load(tmp_path)


def test_a_file_that_mlx_lm_would_not_load(tmp_path: Path):
    file, index = index_of(written(tmp_path))
    index["weight_map"]["extra.weight"] = "extra.safetensors"
    file.write_text(json.dumps(index))
    save_file({"extra.weight": torch.ones(1)}, tmp_path / "extra.safetensors")
    with pytest.raises(CheckpointFileError, match=r"extra\.safetensors.*mlx-lm will not load"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/model.safetensors", "C:\\m", ""])
def test_an_index_that_points_outside_the_folder(name: str, tmp_path: Path):
    file, index = index_of(written(tmp_path))
    index["weight_map"]["x"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointFileError, match="outside the checkpoint's folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_an_index_that_is_not_one(text: str, tmp_path: Path):
    file, _ = index_of(written(tmp_path))
    file.write_text(text)
    with pytest.raises(CheckpointFileError, match=r"^model\.safetensors\.index\.json: "):
        load(tmp_path)


def test_an_index_that_is_not_text(tmp_path: Path):
    file, _ = index_of(written(tmp_path))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointFileError, match="not readable"):
        load(tmp_path)


def test_one_tensor_in_two_shards(tmp_path: Path):
    written(tmp_path)
    save_file({FIRST: torch.ones(1)}, tmp_path / "model-extra.safetensors")
    with pytest.raises(CheckpointFileError, match=r"model-extra.*is in model-0000"):
        load(tmp_path)


def test_a_missing_shard_of_extras_alone_is_no_fault(tmp_path: Path):
    file, index = index_of(written(tmp_path, mtp=True))
    index["weight_map"]["mtp.layers.0.mlp.gate.weight"] = "model-mtp.safetensors"
    file.write_text(json.dumps(index))
    load(tmp_path)


def test_without_an_index_nothing_is_missed(tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    checkpoint.index = False
    load(checkpoint.write(tmp_path, shards=1))
