"""Drafts change when tokens come, and neither which ones nor what is kept for later."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import drafts, models
from support.drafts import Oracle
from support.engine import Greedy, in_process_llm, worker
from vllm_moe_compat.backend.step import drafting
from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.parking import Parking

pytestmark = pytest.mark.serve

Held = tuple[list[bytes], list[np.ndarray]]
# Neither drawn in MLX nor built ahead: the states after a step are those of its tokens.
ONE_CHOICE = {"temperature": 1.0, "top_k": 1, "seed": 3}

# By kind: most drafts, tokens of the prompt, tokens per block where vLLM does not cache every block
# by itself. The first block boundary comes soon after the prompt. With many drafts a pass goes
# over one or more of them.
KINDS: dict[str, tuple[int, int, int]] = {
    "demo": (4, 71, 80),  # gated delta
    "qwen3_moe": (20, 41, 0),
    "granitemoehybrid": (5, 41, 48),  # Mamba-2
    "gpt_oss": (5, 21, 16),  # windows of 24 tokens
    "gemma4_text": (20, 21, 32),
    "deepseek_v3": (5, 41, 0),  # latents
    "kimi_linear": (5, 41, 48),  # KDA
    "nemotron_h": (20, 41, 48),
    "falcon_h1": (60, 41, 48),
    "qwen3_next": (20, 41, 48),
    "lfm2_moe": (20, 21, 16),
    "jamba": (5, 41, 48),
}
DAILY = ("demo", "qwen3_moe", "granitemoehybrid")
TOKENS = 24


def run(
    llm: Any, prompt: Sequence[int], each_step: Callable[[Request], None], count: int = TOKENS
) -> tuple[list[int], int]:
    """Generate tokens; ``each_step`` gets the request after each step that drew.

    Returns the tokens, and how many of the prompt were cached.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    engine, runner = llm.llm_engine, worker(llm).runner
    params = SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False, **ONE_CHOICE)
    engine.add_request("r", TokensPrompt(prompt_token_ids=list(prompt)), params)
    for _ in range(count + 20):
        (output,) = engine.step() or [None]
        for request in runner.batch.requests.values():
            if request.output:
                each_step(request)
        if output is not None and output.finished:
            engine.step()  # The worker is told.
            return list(output.outputs[0].token_ids), output.num_cached_tokens
    raise AssertionError("the request does not end")


def is_equal(one: Held, other: Held) -> bool:
    return one[0] == other[0] and all(
        np.array_equal(*both) for both in zip(one[1], other[1], strict=True)
    )


class Comparison:
    """Compares what a request holds after each step with what it held without drafts."""

    def __init__(self, llm: Any, plain: dict[int, Held]) -> None:
        self.llm, self.plain = llm, plain
        self.compared: set[int] = set()

    def __call__(self, request: Request) -> None:
        done = drafts.computed(request)
        if done not in self.plain:
            return  # Beyond the last token that was asked for.
        assert is_equal(drafts.held(self.llm, request), self.plain[done]), f"after {done} tokens"
        self.compared.add(done)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in DAILY else pytest.mark.full) for kind in KINDS],
)
def test_what_is_held_after_each_step_is_bitwise_that_of_no_drafts(
    kind: str, demo_path: Path, tmp_path: Path
) -> None:
    from vllm import EngineArgs

    most, length, interval = KINDS[kind]
    path = demo_path if kind == "demo" else models.write_mlx(tmp_path / "model", kind)
    greedy = Greedy(path)
    prompt = [5 + (7 * i * i + i) % 490 for i in range(length)]
    answer = greedy.tokens(prompt, TOKENS + most)
    settings = {"enable_prefix_caching": True, "skip_tokenizer_init": True, "max_model_len": 192}
    if interval and "prefix_cache_retention_interval" in EngineArgs.__dataclass_fields__:
        settings["prefix_cache_retention_interval"] = interval  # Before, all states stay.
    with in_process_llm(path, **settings, **drafts.speculating(most)) as llm:
        plain, hits = dict[int, Held](), 0
        drafts.put_in(llm, Oracle(greedy.tokens, "nothing"), most)

        def note(request: Request) -> None:
            plain[drafts.computed(request)] = drafts.held(llm, request)

        assert run(llm, prompt, note)[0] == answer[:TOKENS]
        assert set(plain) == set(range(length, length + TOKENS))
        for pattern, wanted in {
            "none right": {0},
            "all right": {most} if most < TOKENS else set(),
            "each prefix": set(range(min(most, 5) + 1)),
            "mixed": {0, 1},
        }.items():
            llm.reset_prefix_cache()
            oracle = Oracle(greedy.tokens, pattern, no_ids=pattern == "mixed")
            drafts.put_in(llm, oracle, most)
            comparison = Comparison(llm, plain)
            assert run(llm, prompt, comparison)[0] == answer[:TOKENS], pattern
            accepted = {found for _, _, found in oracle.accepted}
            assert accepted >= wanted, (pattern, oracle.accepted)
            assert len(comparison.compared) >= TOKENS // (most + 1), pattern
            hits += check_prefixes(llm, prompt + answer[:TOKENS], length, plain)
        assert hits


def check_prefixes(llm: Any, text: list[int], start: int, plain: dict[int, Held]) -> int:
    """See that requests behind blocks that were cached with drafts hold what they should.

    Returns how many there were: vLLM does not cache a state when a step goes over the boundary.
    """
    block, hits = worker(llm).cache_config.block_size, 0
    drafts.put_in(llm, Oracle(lambda prompt, count: [], "nothing"), 1)
    for end in range(block, len(text) - 1, block):
        if end < start:
            continue  # Not generated.
        found: list[Held] = []
        tokens, cached = run(
            llm, text[: end + 1], lambda request, to=found: to.append(drafts.held(llm, request)), 1
        )
        assert tokens == text[end + 1 : end + 2]
        if cached == end:  # The rest was one pass of one token, as it was without drafts.
            hits += 1
            assert is_equal(found[0], plain[end + 1]), f"behind {end} cached tokens"
    return hits


def test_the_states_that_are_cached_are_those_of_no_drafts(demo_path: Path, greedy: Greedy) -> None:
    """A block of 80 tokens ends inside the answer; drafts go on right behind it."""
    from vllm import EngineArgs

    prompt, most = [5 + (7 * i * i + i) % 490 for i in range(71)], 4
    text = prompt + greedy.tokens(prompt, TOKENS)
    settings = {"enable_prefix_caching": True, "skip_tokenizer_init": True, "max_model_len": 192}
    if "prefix_cache_retention_interval" in EngineArgs.__dataclass_fields__:
        settings["prefix_cache_retention_interval"] = 80
    with in_process_llm(demo_path, **settings, **drafts.speculating(most)) as llm:
        for pattern in ("nothing", "all right"):
            llm.reset_prefix_cache()
            oracle = Oracle(greedy.tokens, pattern)
            drafts.put_in(llm, oracle, most, over_blocks=False)
            assert run(llm, prompt, lambda request: None)[0] == text[71:]
            assert run(llm, text[:90], lambda request: None, 1) == (text[90:91], 80)
        assert (4, 4, 4) in oracle.accepted


@pytest.mark.full
@pytest.mark.parametrize("cache", ["50%", "25%"])
def test_with_a_share_of_the_experts(
    cache: str, demo_path: Path, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass over drafts reads the experts of all of its tokens."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", cache)
    prompts = [[5 + (7 * i * i + i + row) % 490 for i in range(20 + 13 * row)] for row in range(3)]
    with in_process_llm(demo_path, skip_tokenizer_init=True, **drafts.speculating(4)) as llm:
        assert worker(llm).served.expert_cache is not None
        for pattern in ("mixed", "all right"):
            oracle = Oracle(greedy.tokens, pattern)
            drafts.put_in(llm, oracle, 4)
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
            given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
            found = llm.generate(given, params, use_tqdm=False)
            answers = [list(one.outputs[0].token_ids) for one in found]
            assert answers == [greedy.tokens(prompt, 40) for prompt in prompts]
            assert oracle.accepted


def test_answers_end_where_they_end_without_drafts(tmp_path: Path) -> None:
    """Drafts go beyond the last token that is asked for, a stop token, and the longest sequence."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    path = models.write_mlx(tmp_path / "model", "qwen3_moe")
    greedy = Greedy(path)
    prompt = [5 + (7 * i * i + i) % 490 for i in range(41)]
    answer = greedy.tokens(prompt, 60)
    stop = next(t for i, t in enumerate(answer) if i > 6 and t not in answer[:i])
    ends: list[tuple[dict[str, Any], list[int], str]] = [
        ({"max_tokens": 7}, answer[:7], "length"),
        ({"max_tokens": 1}, answer[:1], "length"),
        ({"max_tokens": 60}, answer[:23], "length"),  # 64 tokens in all
        ({"max_tokens": 23, "stop_token_ids": [stop]}, answer[: answer.index(stop) + 1], "stop"),
    ]
    settings = {"skip_tokenizer_init": True, "max_model_len": 64, "enable_prefix_caching": True}
    with (
        in_process_llm(path, **settings, **drafts.speculating(20)) as llm,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(drafting, "useful", lambda request: sys.maxsize)
        for pattern in ("all right", "mixed", "nothing"):
            drafts.put_in(llm, Oracle(greedy.tokens, pattern, no_ids=True), 20)
            params = [
                SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **end)
                for end, _, _ in ends
            ]
            prompts = [TokensPrompt(prompt_token_ids=prompt) for _ in ends]
            found = llm.generate(prompts, params, use_tqdm=False)
            for (end, tokens, reason), output in zip(ends, found, strict=True):
                (one,) = output.outputs
                assert (list(one.token_ids), one.finish_reason) == (tokens, reason), (pattern, end)


class Wrong:
    """A drafter that proposes a token which is never drawn."""

    def propose(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        return [[3] * most for _ in requests]

    def forget(self, req_id: str) -> None:
        """There is nothing to let go of."""


def test_drafts_that_are_wrong_are_parked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    path = models.write_mlx(tmp_path / "model", "qwen3_moe")
    greedy = Greedy(path)
    prompt = [5 + (7 * i * i + i) % 490 for i in range(41)]
    answer = greedy.tokens(prompt, 200)
    assert 3 not in answer
    settings = {"skip_tokenizer_init": True, "max_model_len": 256}
    with in_process_llm(path, **settings, **drafts.speculating(3)) as llm:
        engine = worker(llm).runner.drafting
        engine.drafter, parking = Wrong(), engine.lengths
        verified = []

        def observe(requests: Any, drafted: Any, accepted: Any, seconds: Any) -> None:
            verified.append(max(drafted))
            assert accepted == [0]
            # A machine on which each further token costs a third of a pass.
            Parking.observe(parking, requests, drafted, accepted, 1 + max(drafted) / 3)

        parking.observe = observe
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == answer
        assert len(verified) == 200
        assert 2 <= sum(map(bool, verified)) <= 20
        assert sum("Drafts are parked" in r.getMessage() for r in caplog.records) == 1
