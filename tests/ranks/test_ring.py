"""Ranks that hold a part of each layer compute the logits of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks.test_share import wide
from support import ranks
from vllm_moe_compat import envs
from vllm_moe_compat.probes.recipes import families

# By mlx-lm's class, with gated delta layers and blocks that a cut goes through; by recipes, with
# norms over all heads; latent attention and Kimi's; biases of experts.
DAILY = ("qwen3_5_moe, block FP8", "olmoe", "kimi_linear", "phixtral")
FP8 = ("qwen3_moe, block FP8", "gpt_oss, per-channel FP8", "deepseek_v3, block FP8")
# Two heads of keys and values on four ranks.
REPEATED = ("llama", "mixtral", "olmoe", "mimo_v2_flash", "minimax_m2")


def check(found: list[Any], most: float) -> None:
    """Check every rank's logits, and that it holds less than ``most`` of the model."""
    for rank in found:
        for name, each in rank.items():
            assert each["distance"] < 1e-5, (name, each)
            assert each["same tokens"], (name, each)
            assert each["share"] < most, (name, each)


@pytest.mark.full
def test_two_ranks_compute_what_one_does(tmp_path: Path):
    found = ranks.run("support.rank_logits", tmp_path, 2, *DAILY)
    check(found, 0.57)
    # Heads and states are divided; the latent cache serves all heads, so each rank has all of it.
    kinds = {name: set(each["caches"]) for name, each in found[0].items()}
    assert kinds.pop("kimi_linear") == {0.5, 1.0}
    assert all(ratios == {0.5} for ratios in kinds.values()), kinds


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_two_ranks_compute_every_family(tmp_path: Path):
    check(ranks.run("support.rank_logits", tmp_path, 2, *families(), *FP8, seconds=1100), 0.78)


@pytest.mark.full
def test_four_ranks_repeat_heads_of_keys(tmp_path: Path):
    found = ranks.run("support.rank_logits", tmp_path, 4, *REPEATED)
    check(found, 0.42)
    for name, each in found[3].items():
        # Windows of mimo_v2_flash have four heads.
        wanted = {0.25, 0.5} if name == "mimo_v2_flash" else {0.5}
        assert set(each["caches"]) == wanted, (name, each)


@pytest.mark.full
@pytest.mark.parametrize("setting", ["8bit", "mxfp8", "4bit"])
def test_quantised_ranks_compute_what_one_does(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(envs.QUANTIZE.name, setting)
    folder = tmp_path / "wide"
    folder.mkdir()
    check(ranks.run("support.rank_logits", tmp_path, 2, str(wide(folder))), 0.57)


@pytest.mark.full
@pytest.mark.parametrize("name", ["qwen3_5_moe, block FP8", "olmoe", "gemma4"])
def test_ranks_read_parts_of_experts_from_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(envs.EXPERT_CACHE.name, "50%")
    check(ranks.run("support.rank_logits", tmp_path, 2, name), 0.57)
