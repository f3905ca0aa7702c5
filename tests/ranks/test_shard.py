"""Ranks that hold a part of each layer compute the logits of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from support import ranks
from support.loading import new_model
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.probes.recipes import families
from vllm_moe_compat.ranks.group import RankOf
from vllm_moe_compat.ranks.shard import shard

# Each way of cutting once.
DAILY = (
    "qwen3_moe",  # by its class
    "qwen3_5_moe",  # by its class, with gated delta layers
    "olmoe",  # norms over all heads
    "qwen3_next",  # gated delta, fused by head
    "kimi_linear",  # latent attention and Kimi's
    "bailing_moe_linear",  # fused projections, norms over groups
    "phixtral",  # biases of experts
    "jamba",  # Mamba, which is whole
    "gemma4",  # experts beside an MLP
)
# Two heads of keys and values on four ranks.
REPEATED = ("llama", "mixtral", "olmoe", "mimo_v2_flash", "minimax_m2")
# Two heads of keys in the gated delta layers, two of the indexer.
UNEQUAL = {
    "qwen3_next": "num_k_heads of layers.0.linear_attn is 2",
    "qwen3_5": "num_k_heads of language_model.model.layers.2.linear_attn is 2",
    "kimi_linear": "the output of layers.0.self_attn.b_proj is 2",
    "olmo_hybrid": "linear_attn",
    "minimax_m3_vl": "head counts [4, 4, 2]",
}


def check(found: list[Any], count: int, lowest: float) -> None:
    for rank in found:
        for name, each in rank.items():
            assert each["distance"] < 1e-5, (name, each)
            assert each["same tokens"], (name, each)
            assert each["share"] < lowest, (name, each)


def test_two_ranks_compute_what_one_does(tmp_path: Path):
    found = ranks.run("support.rank_logits", tmp_path, 2, *DAILY)
    check(found, 2, 0.65)
    assert list(found[0]["jamba"]["whole"].values()) == ["JambaMambaMixer"] * 2
    assert found[0]["kimi_linear"]["whole"] == {}


@pytest.mark.full
def test_two_ranks_compute_every_family(tmp_path: Path):
    check(ranks.run("support.rank_logits", tmp_path, 2, *families()), 2, 0.78)


@pytest.mark.full
def test_four_ranks_repeat_heads_of_keys(tmp_path: Path):
    check(ranks.run("support.rank_logits", tmp_path, 4, *REPEATED), 4, 0.4)


def test_every_row_is_among_the_families():
    recorded = {family.module for family in families().values()}
    rest = {name.rpartition(".")[2] for name in TRANSFORMS_BY_MODULE} - recorded
    assert rest == {"gemma4_text", "deepseek_v41", "muse_spark", "youtu_llm"}


@pytest.mark.parametrize("name", UNEQUAL)
def test_heads_that_four_ranks_cannot_divide_are_refused(name: str):
    config = dict(families()[name].release.config)
    with pytest.raises(UnsupportedServingError) as raised:
        shard(new_model(config), RankOf(0, 4))
    assert UNEQUAL[name] in str(raised.value)
    assert "tensor_parallel_size" in str(raised.value)


def test_widths_that_three_ranks_cannot_divide_are_refused():
    for name in ("mixtral", "qwen3_moe"):
        with pytest.raises(UnsupportedServingError, match="64"):
            shard(new_model(dict(families()[name].release.config)), RankOf(0, 3))


def test_a_single_rank_is_whole():
    model = new_model(dict(families()["mixtral"].release.config))
    shard(model, RankOf(0, 1))
    assert model.layers[0].self_attn.num_heads == 4


def test_nothing_is_computed_while_a_model_is_cut():
    model = new_model(dict(families()["mixtral"].release.config))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    shard(model, RankOf(1, 2))
    assert mx.get_peak_memory() - before < 2**16
