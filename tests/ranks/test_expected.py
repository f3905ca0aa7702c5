"""What ranks divide, by names alone, is what cutting a model divides."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlx_lm.utils import load_model

import vllm_moe_compat
from support.loading import parameters
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.plan.estimate import estimate
from vllm_moe_compat.plan.planner import Plan
from vllm_moe_compat.probes.recipes import families
from vllm_moe_compat.probes.variants import write
from vllm_moe_compat.ranks.expected import ranks_that_share
from vllm_moe_compat.ranks.group import RankOf
from vllm_moe_compat.ranks.shard import shard

DAILY = ("qwen3_moe", "qwen3_5_moe", "qwen3_next", "deepseek_v3", "jamba", "lfm2_moe", "nemotron_h")
NAMES = [pytest.param(name, marks=() if name in DAILY else pytest.mark.full) for name in families()]


@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_within_two_percent_of_what_a_rank_holds(name: str, tmp_path: Path):
    family = families()[name]
    module = f"mlx_lm.models.{family.module}"
    write(tmp_path, family, TRANSFORMS_BY_MODULE[module], "release")
    with vllm_moe_compat.applied(), loading_with(dtype="float32"):
        model = load_model(tmp_path, lazy=True)[0]
    whole = parameters(model)
    shard(model, RankOf(0, 2))
    held = sum(array.nbytes for array in parameters(model).values())
    tied = not any("lm_head" in key for key in whole)
    ranks_of = ranks_that_share(whole, 2, module, tied=tied)
    expected = sum(array.nbytes / ranks_of(key) for key, array in whole.items())
    assert abs(expected / held - 1) < 0.02


def test_the_estimate_of_a_load_follows():
    tensors = {
        "model.layers.0.mlp.down_proj.weight": TensorInfo("BF16", (64, 96)),
        "model.embed_tokens.weight": TensorInfo("BF16", (100, 64)),
    }
    ranks_of = ranks_that_share(tensors, 4, "mlx_lm.models.llama")
    whole = estimate(Plan("m", ""), tensors, "BF16")
    part = estimate(Plan("m", ""), tensors, "BF16", ranks_of=ranks_of)
    assert whole.final["none"] == 2 * 64 * (96 + 100)
    assert part.final["none"] == 2 * 64 * (96 // 4 + 100)
    assert part.peak["none"] < whole.peak["none"]
    assert part.final["8bit"] < whole.final["8bit"]
