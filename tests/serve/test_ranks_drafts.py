"""Ranks that verify drafts together; the drafts come from one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.test_ranks import CHOICE, PROMPTS, SEEDED
from support import rank_engine
from support.engine import Greedy

pytestmark = [pytest.mark.serve, pytest.mark.full]

NGRAM = {
    **{"method": "ngram", "num_speculative_tokens": 3},
    **{"prompt_lookup_min": 1, "prompt_lookup_max": 3},
}
LONG = {"max_tokens": 40}
JOBS: dict[str, dict[str, Any]] = {
    "greedy": {"prompts": PROMPTS, "params": LONG},
    "seeded": {"prompts": PROMPTS[:2], "params": SEEDED},
    "cached": {"prompts": PROMPTS, "params": LONG},
    "choice": {"prompts": PROMPTS[:1], "params": CHOICE},
    "drafts": {"drafts": True},
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_they_have_the_tokens_of_no_drafts(
    demo_path: Path, greedy: Greedy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Prompts in chunks, fewer pages than they need, and cached prefixes."""
    monkeypatch.setenv("VLLM_MOE_COMPAT_PARK_DRAFTS", "0")
    settings: dict[str, Any] = {
        **{f"{kind}_parallel_size": 2, "enable_prefix_caching": True, "disable_log_stats": False},
        **{"max_num_batched_tokens": 96, "max_num_seqs": 8, "max_model_len": 432},
        **{"num_gpu_blocks_override": 34},
    }
    found, plain = (
        dict(zip(JOBS, rank_engine.run(demo_path, list(JOBS.values()), **given)[0], strict=True))
        for given in (settings | {"speculative_config": NGRAM}, settings)
    )
    wanted = [greedy.tokens(prompt, 40) for prompt in PROMPTS]
    for job in ("greedy", "cached"):
        assert [tokens for tokens, _ in found[job]] == wanted
    assert found["seeded"] == plain["seeded"]
    assert found["choice"] == plain["choice"]
    drafted, accepted = found["drafts"]
    assert 20 < accepted < drafted
    assert plain["drafts"] == [0, 0]
