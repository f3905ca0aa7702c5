"""A rank's load gives bit for bit its part of the whole model, and reads and holds no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import vllm_moe_compat
from support.loading import new_model, parameters, same_bits
from vllm_moe_compat import envs
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.probes.recipes import families
from vllm_moe_compat.probes.variants import write
from vllm_moe_compat.ranks.group import RankOf
from vllm_moe_compat.ranks.shard import shard
from vllm_moe_compat.ranks.share import Share

FORMS = ("release", "combined", "block FP8", "per-channel FP8", "per-tensor FP8")
DAILY = [
    ("qwen3_moe", "release"),
    ("qwen3_moe", "block FP8"),
    ("qwen3_5_moe", "release"),
    ("qwen3_5_moe", "block FP8"),
    ("gpt_oss", "release"),
    ("llama4", "per-channel FP8"),
    ("deepseek_v3", "block FP8"),
    ("qwen3_next", "release"),
    ("minimax_m2", "release"),
    ("phixtral", "release"),
]


def cells() -> list[Any]:
    return [
        pytest.param(name, form, marks=() if (name, form) in DAILY else pytest.mark.full)
        for name in families()
        for form in FORMS
    ]


def written(folder: Path, name: str, form: str) -> bool:
    family = families()[name]
    row = TRANSFORMS_BY_MODULE[f"mlx_lm.models.{family.module}"]
    return write(folder, family, row, form) is not None


def load(folder: Path, **options: Any) -> Any:
    with vllm_moe_compat.applied(), loading_with(dtype="float32", **options):
        return load_model(folder)[0]


def stored_bytes(folder: Path) -> int:
    return sum(
        array.nbytes
        for file in folder.glob("model*.safetensors")
        for array in mx.load(str(file)).values()  # type: ignore[union-attr]
    )


@pytest.mark.parametrize(("name", "form"), cells())
def test_a_share_is_that_part_of_the_whole(name: str, form: str, tmp_path: Path):
    if not written(tmp_path, name, form):
        return  # The family has no such form.
    for rank in range(2):
        seat = RankOf(rank, 2)
        whole = load(tmp_path)
        shard(whole, seat)
        share = Share(tmp_path, seat)
        found = load(tmp_path, arrange=share)
        assert same_bits(parameters(found), parameters(whole)), rank


# Embedding and head are whole, and so are norms; of a tiny model they are a quarter.
@pytest.mark.parametrize(
    ("name", "form", "most"),
    [
        ("qwen3_moe", "release", 0.56),
        ("qwen3_moe", "block FP8", 0.75),
        ("qwen3_5_moe", "release", 0.56),
        ("llama4", "release", 0.56),
    ],
)
def test_each_rank_reads_its_part_of_the_files(name: str, form: str, most: float, tmp_path: Path):
    written(tmp_path, name, form)
    for rank in range(2):
        share = Share(tmp_path, RankOf(rank, 2), gap=0)
        load(tmp_path, arrange=share)
        assert share.stored is not None
        assert share.stored.bytes_read < most * stored_bytes(tmp_path)


WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "head_dim": 32,
    "num_experts": 8,
}


def wide(folder: Path, packing: dict[str, Any] | None = None) -> Path:
    """Write a model of mlx-lm's form that is wide enough for groups on four ranks."""
    config = dict(families()["qwen3_moe"].release.config) | WIDE
    mx.random.seed(0)
    model = new_model(config)
    if packing is not None:
        nn.quantize(model, **packing)
        config["quantization"] = packing
    mx.save_safetensors(str(folder / "model.safetensors"), parameters(model))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "packing",
    [
        {"group_size": 32, "bits": 4, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        {"group_size": 64, "bits": 6, "mode": "affine"},
    ],
    ids=str,
)
def test_packed_weights_are_cut_between_groups(packing: dict[str, Any], tmp_path: Path):
    wide(tmp_path, packing)
    for rank in (0, 3):
        seat = RankOf(rank, 4)
        whole = load(tmp_path)
        try:
            shard(whole, seat)
        except UnsupportedServingError:
            # 32 columns of the attention's output on each of four ranks.
            assert packing["group_size"] == 64
            with pytest.raises(UnsupportedServingError, match="tensor_parallel_size"):
                load(tmp_path, arrange=Share(tmp_path, seat))
            return
        share = Share(tmp_path, seat)
        found = load(tmp_path, arrange=share)
        assert same_bits(parameters(found), parameters(whole))
        assert [type(m) for m in found.modules()] != [type(m) for m in whole.modules()]


@pytest.mark.parametrize("setting", ["mxfp8", "4bit"])
def test_a_share_is_quantised_as_the_whole_is(setting: str, tmp_path: Path):
    wide(tmp_path)
    with envs.override({envs.QUANTIZE.name: setting}):
        for rank in range(2):
            seat = RankOf(rank, 2)
            whole = load(tmp_path)
            shard(whole, seat)
            found = load(tmp_path, arrange=Share(tmp_path, seat))
            assert same_bits(parameters(found), parameters(whole))
            assert any(name.endswith("o_proj.scales") for name in parameters(found))


def test_groups_that_a_cut_goes_through_are_refused_before_reading(tmp_path: Path):
    wide(tmp_path)
    share = Share(tmp_path, RankOf(0, 4))
    with (
        envs.override({envs.QUANTIZE.name: "4bit"}),
        pytest.raises(UnsupportedServingError, match=r"o_proj.*32 of 128 columns"),
    ):
        load(tmp_path, arrange=share)
    assert share.stored is None


def test_a_rank_holds_little_more_than_its_share(tmp_path: Path):
    wide(tmp_path)
    size = sum(a.nbytes for _, a in tree_flatten(parameters(load(tmp_path))))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = load(tmp_path, arrange=Share(tmp_path, RankOf(1, 2)))
    held = sum(a.nbytes for a in parameters(model).values())
    layer = sum(a.nbytes for a in parameters(model.layers[0]).values())
    assert held < 0.56 * size
    assert mx.get_peak_memory() - before < held + layer / 4
