"""Under any schedule, the tokens are mlx-lm's single-sequence tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import models, schedules
from support.engine import Greedy

pytestmark = [pytest.mark.serve, pytest.mark.timeout(3600)]  # --schedules is open-ended

# Few blocks starve the scheduler into preemptions; few tokens per step cut
# prompts into chunks.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefix": {"enable_prefix_caching": True},
    "chunks": {"max_num_batched_tokens": 48, "max_num_seqs": 6},
    "prefix-chunks": {"enable_prefix_caching": True, "max_num_batched_tokens": 90},
    "starved": {"num_gpu_blocks_override": 20, "max_model_len": 432, "max_num_seqs": 3},
    "starved-prefix": {
        "num_gpu_blocks_override": 34,
        "max_model_len": 432,
        "enable_prefix_caching": True,
    },
    "async": {"async_scheduling": True},
    "async-starved-prefix": {
        "async_scheduling": True,
        "num_gpu_blocks_override": 34,
        "max_model_len": 432,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 128,
    },
}


# Each of the others is part of one of these.
EACH_DAY = ("prefix-chunks", "starved", "async-starved-prefix")
FULL = pytest.mark.full


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EACH_DAY else FULL) for name in SETTINGS]
)
def test_tokens_are_those_of_a_single_sequence(
    name: str, demo_path: Path, greedy: Greedy, schedule_budget: int
) -> None:
    # A block holds 80 tokens: only long answers need another one midway.
    output = 90 if "starved" in name else 24
    schedules.check(name, demo_path, SETTINGS[name], greedy, schedule_budget, output=output)


# Other kinds of layers: windows with sinks; heads of two sizes, so blocks of two sizes;
# chunks, one sequence at a time; latents; states. With so few blocks that two of the
# longest sequences do not fit.
TIGHT: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "skip_tokenizer_init": True,
}
KINDS = {
    "gpt_oss": 30,
    "gemma4_text": 36,
    "llama4": 18,
    "deepseek_v3": 18,
    "lfm2_moe": 26,
    "jamba": 26,
}
# With a window, a latent, and states beside a short convolution; the others are like these.
DAILY = ("gpt_oss", "deepseek_v3", "jamba")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(
            pytest.param(kind, "async-starved-prefix", marks=() if kind in DAILY else FULL)
            for kind in KINDS
        ),
        pytest.param("jamba", "starved", marks=FULL),
    ],
)
def test_other_layers_give_the_tokens_of_a_single_sequence(
    kind: str, name: str, tmp_path: Path, schedule_budget: int
) -> None:
    path = models.write_mlx(tmp_path / "model", kind)
    settings = TIGHT | {
        "enable_prefix_caching": "prefix" in name,
        "async_scheduling": "async" in name,
        "num_gpu_blocks_override": KINDS[kind] if "starved" in name else None,
    }
    schedules.check(name, path, settings, Greedy(path), schedule_budget, longest=150, output=60)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        ("demo", "25%"),
        ("gpt_oss", "50%"),
        ("deepseek_v3", "50%"),
        ("jamba", "50%"),
    ],
)
def test_a_share_of_the_experts_gives_the_tokens_of_a_single_sequence(
    kind: str,
    cache: str,
    demo_path: Path,
    tmp_path: Path,
    greedy: Greedy,
    schedule_budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a pass is computed while it is built; the tokens are those of all experts in memory."""
    name = "async-starved-prefix"
    path, settings, sizes = demo_path, SETTINGS[name], {"output": 90}
    if kind != "demo":
        path, sizes = models.write_mlx(tmp_path / "model", kind), {"longest": 150, "output": 60}
        settings = TIGHT | {
            "enable_prefix_caching": True,
            "async_scheduling": True,
            "num_gpu_blocks_override": KINDS[kind],
        }
        greedy = Greedy(path)
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", cache)
    schedules.check(name, path, settings, greedy, max(1, schedule_budget // 2), **sizes)
