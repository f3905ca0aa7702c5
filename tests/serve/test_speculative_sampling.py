"""Sampling parameters and drafts: what an engine with n-grams answers is what it answers without.

The demo model repeats itself, so many drafts are right, and short n-grams make many that are wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support import drafts
from support.engine import engine_core, in_process_llm, worker
from support.server import serve

pytestmark = pytest.mark.serve

NGRAMS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
PROMPTS = [
    "Beautiful is better than",
    "Now is better than never. Now is better",
    "Zen ",
    "Errors should never pass silently. Errors should",
]
SETTINGS: dict[str, Any] = {
    "max_num_batched_tokens": 48,
    "max_num_seqs": 12,
    "max_model_len": 256,
    "max_logprobs": 512,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


def made(**values: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in values:
        values["structured_outputs"] = StructuredOutputsParams(**values["structured_outputs"])
    return SamplingParams(**({"max_tokens": 40} | values))


SEEDED = {"temperature": 0.9, "seed": 5}
OBJECT = {
    "type": "object",
    "properties": {"rule": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["rule", "count"],
    "additionalProperties": False,
}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    SEEDED,
    SEEDED | {"top_k": 8},
    SEEDED | {"top_p": 0.8},
    SEEDED | {"min_p": 0.05},
    {"temperature": 0, "repetition_penalty": 1.3},
    SEEDED | {"presence_penalty": 0.7},
    SEEDED | {"frequency_penalty": 0.4},
    {"temperature": 0, "logit_bias": {40: 3.0, 41: -3.0}},
    {"temperature": 0, "min_tokens": 17, "stop": ["better", "."]},
    {"temperature": 0, "min_tokens": 11, "stop_token_ids": list(range(60, 120))},
    {"temperature": 0, "stop": ["than"], "include_stop_str_in_output": True},
    {"temperature": 0, "stop": ["etter"], "logprobs": 2},
    {"temperature": 0, "stop_token_ids": list(range(100, 120))},
    SEEDED | {"bad_words": ["better", "is"]},
    SEEDED | {"allowed_token_ids": list(range(40, 400, 3)), "ignore_eos": True},
    SEEDED | {"logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0, "logprobs": 0, "max_tokens": 23},
    SEEDED | {"logprobs": -1, "max_tokens": 7},
    {"temperature": 0, "structured_outputs": {"choice": ["namespaces are better", "honking"]}},
    SEEDED | {"structured_outputs": {"regex": r"([a-f]{2}-){5}[0-9]{9}"}, "logprobs": 1},
    SEEDED | {"structured_outputs": {"json": OBJECT}, "max_tokens": 120},
    {"temperature": 0, "structured_outputs": {"grammar": 'root ::= ("is better " | "no ")*'}},
    SEEDED | {"n": 3, "max_tokens": 20},
]


def answers(llm: Any, prompts: list[Any], kinds: list[dict[str, Any]]) -> list[Any]:
    outputs = llm.generate(prompts, [made(**kind) for kind in kinds], use_tqdm=False)
    return [answer(output) for output in outputs]


def answer(output: Any) -> list[Any]:
    """All that a request got, of each of its answers, and of its prompt."""
    return [
        [list(one.token_ids), one.text, one.finish_reason, one.stop_reason, _numbers(one.logprobs)]
        for one in output.outputs
    ] + [_numbers(output.prompt_logprobs)]


def _rounded(found: Any) -> Any:
    """What was found, with log-probabilities as far as prompts cut elsewhere have the same."""
    if isinstance(found, float):
        return pytest.approx(found, abs=1e-4)
    if isinstance(found, dict):
        return {key: _rounded(value) for key, value in found.items()}
    return [_rounded(one) for one in found] if isinstance(found, list) else found


def _numbers(logprobs: Any) -> Any:
    return logprobs and [
        entry and {token: [one.logprob, one.rank] for token, one in entry.items()}
        for entry in logprobs
    ]


@pytest.fixture(scope="module")
def plain(demo_path: Path) -> Iterator[Any]:
    """An engine without speculation."""
    with in_process_llm(demo_path, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm(demo_path: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MOE_COMPAT_PARK_DRAFTS", "0")
        with in_process_llm(demo_path, speculative_config=NGRAMS, **SETTINGS) as llm:
            yield llm


@pytest.fixture
def accepted(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Numbers of drafts verified and accepted, per request and step."""
    sampler = worker(llm).runner.sampler
    counts: list[tuple[int, int]] = []
    verify = sampler.verify

    def noted(*args: Any) -> Any:
        requests = worker(llm).runner.batch.requests
        order, tokens, logprobs = verify(*args)
        for req_id, new in zip(order, tokens, strict=True):
            if requests[req_id].drafts:
                counts.append((len(requests[req_id].drafts), len(new) - 1))
        return order, tokens, logprobs

    monkeypatch.setattr(sampler, "verify", noted)
    return counts


@pytest.mark.parametrize(
    "prompt", [0, *(pytest.param(i, marks=pytest.mark.full) for i in range(1, len(PROMPTS)))]
)
def test_every_kind_of_parameters(
    llm: Any, plain: Any, accepted: list[tuple[int, int]], prompt: int
) -> None:
    prompts = [PROMPTS[prompt]] * len(KINDS)
    found, expected = (answers(engine, prompts, KINDS) for engine in (llm, plain))
    for kind, one, other in zip(KINDS, found, expected, strict=True):
        assert one == other, kind
    # All drafts right, none, and some.
    assert any(right == count for count, right in accepted)
    assert any(right == 0 for _, right in accepted)
    assert any(0 < right < count for count, right in accepted)


STARVED: dict[str, Any] = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 40,
    "num_gpu_blocks_override": 16,
    "max_num_seqs": 6,
}


@pytest.mark.full
@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("pattern", ["each prefix", "mixed"])
def test_random_schedules_with_drafts_of_every_acceptance(
    demo_path: Path, plain: Any, pattern: str, most: int, schedule_budget: int
) -> None:
    """Chunks, preemptions and shared prefixes; requests come at any time, and some are aborted."""
    kinds = [kind for kind in KINDS if "n" not in kind]
    for seed in range(schedule_budget):
        draw = random.Random(seed)
        tokenizer = plain.get_tokenizer()
        beginnings = [tokenizer.encode(text * 3, add_special_tokens=False) for text in PROMPTS]
        prompts = [
            [*draw.choice(beginnings)[: draw.choice([5, 17, 33])], 5 + number]
            for number in range(len(kinds))
        ]
        asked: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        expected = answers(plain, asked, kinds)
        known = {tuple(prompt): one[0][0] for prompt, one in zip(prompts, expected, strict=True)}

        def tokens(
            prompt: Sequence[int], count: int, known: dict[Any, list[int]] = known
        ) -> list[int]:
            return (known[tuple(prompt)] + [7] * count)[:count]

        settings = SETTINGS | STARVED | drafts.speculating(most)
        with in_process_llm(demo_path, **settings) as llm:
            oracle = drafts.Oracle(tokens, pattern, seed=seed)
            drafts.put_in(llm, oracle, most)
            found = arrive(llm, asked, kinds, draw)
            for number, one in found.items():
                assert one == _rounded(expected[number]), (seed, kinds[number])
            assert len(found) > len(kinds) // 2
            right = {(count, accepted) for _, count, accepted in oracle.accepted}
            assert {(most, i) for i in range(most + 1)} <= right


def arrive(
    llm: Any, prompts: Sequence[Any], kinds: Sequence[dict[str, Any]], draw: random.Random
) -> dict[int, list[Any]]:
    """Send requests at drawn steps, abort a few, and return the answers of the others."""
    engine, found = llm.llm_engine, dict[int, list[Any]]()
    waiting = list(range(len(kinds)))
    draw.shuffle(waiting)
    aborted: dict[int, int] = {}
    for step in range(3000):
        if waiting and draw.random() < 0.4:
            number = waiting.pop()
            engine.add_request(str(number), prompts[number], made(**kinds[number]))
            if draw.random() < 0.15:
                aborted[number] = step + draw.randint(1, 8)
        for number, due in aborted.items():
            if due == step:
                engine.abort_request([str(number)])
        for output in engine.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                found[int(output.request_id)] = answer(output)
        if not waiting and not engine.has_unfinished_requests():
            break
    engine.step()
    pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not worker(llm).runner.batch.requests
    return found


HTTP: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": 2},
    SEEDED | {"top_p": 0.8},
    SEEDED | {"min_p": 0.05, "logit_bias": {40: 2.0}},
    {"temperature": 0, "stop": ["etter"], "logprobs": 1},
    {"temperature": 0, "min_tokens": 11, "stop_token_ids": list(range(60, 120))},
    SEEDED | {"structured_outputs": {"regex": "([a-f]{2}-){5}[0-9]{9}"}},
    SEEDED | {"n": 2},
]


@pytest.mark.full
def test_over_http(demo_path: Path, plain: Any, tmp_path: Path) -> None:
    arguments = ["--speculative-config", json.dumps(NGRAMS), "--max-num-seqs", "12"]
    env = {"VLLM_MOE_COMPAT_PARK_DRAFTS": "0"}
    with serve(demo_path, tmp_path / "log", *arguments, env=env) as server:
        for kind in HTTP:
            body: dict[str, Any] = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 40} | kind
            body["return_token_ids"] = True
            answer = server.request("/v1/completions", body)
            (output,) = plain.generate([PROMPTS[0]], made(**kind), use_tqdm=False)
            for mine, theirs in zip(answer["choices"], output.outputs, strict=True):
                assert mine["text"] == theirs.text, kind
                assert mine["token_ids"] == list(theirs.token_ids), kind
                assert mine["finish_reason"] == theirs.finish_reason, kind
                assert mine["stop_reason"] == theirs.stop_reason, kind
                if "logprobs" in kind:
                    chosen = [
                        entry[token].logprob
                        for token, entry in zip(theirs.token_ids, theirs.logprobs, strict=True)
                    ]
                    assert mine["logprobs"]["token_logprobs"] == pytest.approx(chosen, abs=1e-4)
            count = sum(len(one.token_ids) for one in output.outputs)
            assert answer["usage"]["completion_tokens"] == count
            if "n" not in kind:
                chunks = list(server.stream("/v1/completions", body))
                (mine,) = output.outputs
                assert "".join(one["choices"][0]["text"] for one in chunks) == mine.text
                got = [token for one in chunks for token in one["choices"][0]["token_ids"] or ()]
                assert got == list(mine.token_ids)
        assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
