"""Ranks with a range of the layers each; vLLM's executor starts them as processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import models, rank_engine
from support.engine import Greedy, in_process_llm

pytestmark = pytest.mark.serve

LONG = [20 + i % 150 for i in range(170)]
PROMPTS = [[5, 6, 7, 8, 9], LONG[:90], [*LONG[::-1], *LONG[:40]], [3, 1, 4, 1, 5], LONG]
SEEDED = {"temperature": 1.0, "seed": 7, "top_p": 0.9}


def test_both_kinds_of_ranks_together_are_refused(demo_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="tensor and pipeline parallelism together"),
        in_process_llm(demo_path, tensor_parallel_size=2, pipeline_parallel_size=2),
    ):
        pass


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_hybrid_in_two_ranges(demo_path: Path, greedy: Greedy) -> None:
    """The first range has states only; the pages are too few for all prompts at once."""
    jobs: list[dict[str, Any]] = [
        {"prompts": PROMPTS},
        {"prompts": PROMPTS},
        {"prompts": PROMPTS[:2], "params": SEEDED},
        {"prompts": PROMPTS[:2], "params": SEEDED},
        {"prompts": PROMPTS[:2], "params": {"prompt_logprobs": 1, "logprobs": 2}},
        {"held": True},
    ]
    settings = {"max_num_batched_tokens": 96, "max_num_seqs": 8, "max_model_len": 512}
    (plain, cached, seeded, again, scored, held), _ = rank_engine.run(
        demo_path,
        jobs,
        pipeline_parallel_size=2,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=1_200_000,
        **settings,
    )
    wanted = [greedy.tokens(prompt, 24) for prompt in PROMPTS]
    for found in (plain, cached):
        assert [tokens for tokens, _ in found] == wanted
    assert seeded == again
    assert [tokens for tokens, _ in scored] == wanted[:2]
    assert max(held) < 0.6 * sum(held)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_windows_beside_full_layers_in_four_ranges(tmp_path: Path) -> None:
    """Each rank has layers of one kind only."""
    path = models.write_mlx(tmp_path / "model", "gpt_oss")
    (found,), _ = rank_engine.run(
        path,
        [{"prompts": PROMPTS[:2], "params": {"max_tokens": 6}}],
        pipeline_parallel_size=4,
        skip_tokenizer_init=True,
        max_num_batched_tokens=96,
        max_model_len=512,
        kv_cache_memory_bytes=1_200_000,
        enable_prefix_caching=True,
    )
    one = Greedy(path)
    assert [tokens for tokens, _ in found] == [one.tokens(prompt, 6) for prompt in PROMPTS[:2]]
