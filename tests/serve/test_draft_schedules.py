"""Under any schedule, with drafts of every pattern, the tokens are those of a single sequence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from support import drafts, models, schedules
from support.engine import Greedy
from vllm_moe_compat.backend.step import drafting

pytestmark = [pytest.mark.serve, pytest.mark.timeout(3600)]  # --schedules is open-ended

OUTPUT, FULL = 60, pytest.mark.full
# As in test_schedules.py: few blocks starve the scheduler, few tokens per step cut prompts.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 48, "max_num_seqs": 6},
    "starved": {"max_num_batched_tokens": 64},
    "prefix": {"enable_prefix_caching": True, "max_num_batched_tokens": 90},
    "starved-prefix": {"enable_prefix_caching": True, "max_num_batched_tokens": 64},
}
# Kind → blocks with which two of the longest sequences do not fit, and most drafts.
KINDS: dict[str, tuple[int, int]] = {
    "demo": (20, 4),
    "qwen3_moe": (20, 20),
    "gpt_oss": (30, 5),
    "gemma4_text": (36, 5),
    "llama4": (18, 3),
    "deepseek_v3": (18, 5),
    "granitemoehybrid": (20, 20),
    "kimi_linear": (20, 5),
    "nemotron_h": (14, 5),
    "falcon_h1": (13, 5),
    "lfm2_moe": (26, 20),
    "jamba": (20, 5),
}
# With few seeds, too.
SURE = ("demo", "qwen3_moe", "gpt_oss", "gemma4_text", "llama4", "deepseek_v3")
DAILY = {("gpt_oss", "starved-prefix", "each prefix")}
PATTERNS = ("none right", "all right", "each prefix", "mixed")
CASES = [
    *(("demo", name, pattern) for name in SETTINGS for pattern in PATTERNS),
    *(
        (kind, "starved-prefix", pattern)
        for kind in KINDS
        if kind != "demo"
        for pattern in PATTERNS
    ),
    *((kind, "chunks", "mixed") for kind in KINDS if kind != "demo"),
]


@pytest.mark.parametrize(
    ("kind", "name", "pattern"),
    [pytest.param(*case, marks=() if case in DAILY else FULL) for case in CASES],
)
def test_tokens_are_those_of_a_single_sequence(
    kind: str,
    name: str,
    pattern: str,
    demo_path: Path,
    tmp_path: Path,
    greedy: Greedy,
    schedule_budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks, most = KINDS[kind]
    path, longest = demo_path, 333
    settings: dict[str, Any] = {"max_model_len": 432, **SETTINGS[name], **drafts.speculating(most)}
    if kind != "demo":
        path, longest = models.write_mlx(tmp_path / "model", kind), 150
        greedy = Greedy(path)
        settings |= {"max_model_len": 256, "skip_tokenizer_init": True}
    if "starved" in name:
        settings["num_gpu_blocks_override"] = blocks
    # Drafts beyond the last token that was asked for are verified, too.
    monkeypatch.setattr(drafting, "useful", lambda request: sys.maxsize)
    oracle = drafts.Oracle(
        lambda prompt, count: greedy.tokens(prompt, OUTPUT + most)[:count],
        pattern,
        no_ids=pattern == "mixed",
    )
    schedules.check(
        name,
        path,
        settings,
        greedy,
        max(1, schedule_budget // 2) if (kind, name, pattern) in DAILY else schedule_budget,
        # Requests whose drafts are right end within a few steps.
        sure="starved" not in name or (kind in SURE and pattern != "all right"),
        prepare=lambda llm: drafts.put_in(llm, oracle, most),
        longest=longest,
        output=OUTPUT,
    )
    accepted = {found for _, _, found in oracle.accepted}
    wanted = {"none right": {0}, "all right": {most}}
    assert accepted >= wanted.get(pattern, set(range(min(most, 5) + 1)))
