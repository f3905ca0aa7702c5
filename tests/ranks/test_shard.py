"""Models that are cut for one rank: what is refused, what stays whole."""

from __future__ import annotations

import mlx.core as mx
import pytest

from support.loading import new_model
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.probes.recipes import families
from vllm_moe_compat.ranks.group import RankOf
from vllm_moe_compat.ranks.shard import shard

# Two heads of keys in the gated delta layers, two of the indexer.
UNEQUAL = {
    "qwen3_next": "num_k_heads of layers.0.linear_attn is 2",
    "qwen3_5": "num_k_heads of language_model.model.layers.2.linear_attn is 2",
    "kimi_linear": "the output of layers.0.self_attn.b_proj is 2",
    "olmo_hybrid": "linear_attn",
    "minimax_m3_vl": "head counts [4, 4, 2]",
}


def test_what_has_no_recipe_is_whole():
    for name, kind in (("jamba", "JambaMambaMixer"), ("lfm2", "ShortConv"), ("olmoe", None)):
        cutting = shard(new_model(dict(families()[name].release.config)), RankOf(0, 2))
        assert set(cutting.whole.values()) == ({kind} if kind else set())
        assert cutting.cut


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
