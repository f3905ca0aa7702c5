"""Requests with a common prefix reuse its pages and states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import models
from support.engine import Greedy, in_process_llm, worker

pytestmark = pytest.mark.serve


def ask(llm: Any, prompts: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Return the number of cached tokens and the answer for each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [
        (output.num_cached_tokens or 0, list(output.outputs[0].token_ids))
        for output in llm.generate(given, params, use_tqdm=False)
    ]


def tokens(count: int, seed: int) -> list[int]:
    return [(seed * i + i * i) % 400 + 5 for i in range(count)]


@pytest.mark.parametrize(
    ("kind", "scheduling"),
    [
        ("qwen3_moe", "sync"),
        *((kind, "async") for kind in ("qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "demo")),
    ],
)
def test_a_prefix_that_is_computed_in_the_same_step(
    kind: str, scheduling: str, demo_path: Path, tmp_path: Path
) -> None:
    """vLLM counts a block as cached when it schedules it, before anything is computed.

    The first prompt ends where a block does, and its last token is one of those that
    the others begin behind.
    """
    path = demo_path if kind == "demo" else models.write_mlx(tmp_path / "model", kind)
    greedy = Greedy(path)
    settings = {"skip_tokenizer_init": True, "max_num_batched_tokens": 2048}
    with in_process_llm(
        path, enable_prefix_caching=True, async_scheduling=scheduling == "async", **settings
    ) as llm:
        block = worker(llm).cache_config.block_size
        first = tokens(2 * block, 3)
        second = first + tokens(26, 7)  # shorter than the first: a later row of its pass
        third = first + tokens(5 * block, 11)  # longer: a pass of its own, before the first
        fourth = third + tokens(9, 13)
        prompts = [first, second, third, fourth, [*first, 9]]
        answers = ask(llm, prompts)
        assert [answer for _, answer in answers] == [greedy.tokens(p, 8) for p in prompts]
        if kind in ("qwen3_moe", "deepseek_v3", "llama4"):
            assert answers[1][0] == 2 * block
            assert answers[3][0] == 7 * block


@pytest.mark.parametrize("kind", ["demo", "gpt_oss"])
def test_a_server_of_one_sequence_remembers_a_shared_prefix(
    kind: str, demo_path: Path, tmp_path: Path
) -> None:
    """From the third prompt on: vLLM keeps a state where two prompts have diverged."""
    path = demo_path if kind == "demo" else models.write_mlx(tmp_path / "model", kind)
    greedy = Greedy(path)
    settings = {"kv_cache_memory_bytes": None, "max_num_batched_tokens": 512}
    with in_process_llm(
        path, enable_prefix_caching=True, max_num_seqs=1, skip_tokenizer_init=True, **settings
    ) as llm:
        block = worker(llm).cache_config.block_size
        shared = tokens(5 * block + 3, 3)
        for turn in range(4):
            prompt = shared + tokens(40, 100 + turn)
            ((cached, answer),) = ask(llm, [prompt])
            assert answer == greedy.tokens(prompt, 8)
            assert (cached > 0) >= (turn > 1)
            # Another conversation in between.
            ask(llm, [tokens(6 * block, 50 + turn)])
