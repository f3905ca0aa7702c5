"""Requests drawn in MLX and requests drawn by vLLM's sampler, in a running engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.engine import Greedy, in_process_llm, worker

pytestmark = pytest.mark.serve

LOOSE = "Zen "
PROMPTS = ["Beautiful is better than", "Explicit is", "Now is better", "Errors should"]


@pytest.fixture(scope="module")
def llm(demo_path: Path) -> Iterator[Any]:
    with in_process_llm(demo_path) as llm:
        yield llm


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shapes of all logits copied to torch."""
    from vllm_moe_compat.backend.vllm import sampling

    shapes: list[tuple[int, ...]] = []
    real = sampling.to_torch

    def noted(logits: Any) -> Any:
        shapes.append(tuple(logits.shape))
        return real(logits)

    monkeypatch.setattr(sampling, "to_torch", noted)
    return shapes


def answers(llm: Any, params: Any, prompts: Any = None) -> list[list[int]]:
    outputs = llm.generate(prompts or PROMPTS, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def made(**params: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**({"max_tokens": 8, "ignore_eos": True} | params))


PLAIN: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1, "top_p": 0.9},
    {"temperature": 1, "stop": ["nothing like it"], "skip_special_tokens": False},
]


@pytest.mark.parametrize("params", PLAIN, ids=str)
def test_plain_requests_copy_no_logits_and_are_built_ahead(
    llm: Any, copied: list[tuple[int, ...]], params: dict[str, Any]
) -> None:
    forward = worker(llm).runner.forward
    hits = forward.hits
    assert [len(tokens) for tokens in answers(llm, made(**params))] == [8] * len(PROMPTS)
    assert copied == []
    assert forward.hits > hits


def test_with_async_scheduling_the_engine_goes_on_while_a_pass_runs(demo_path: Path) -> None:
    """The next step is scheduled during a pass, while requests end and others arrive."""
    found = []
    for asynchronous in (False, True):
        with in_process_llm(demo_path, async_scheduling=asynchronous) as llm:
            engine, forward = llm.llm_engine, worker(llm).runner.forward
            running = []
            got: dict[str, list[int]] = {}
            waiting = [3, 9, 14, 20]
            while waiting or engine.has_unfinished_requests():
                if waiting:
                    count = waiting.pop(0)
                    params = made(temperature=0, max_tokens=count)
                    engine.add_request(str(count), PROMPTS[0], params)
                running.append(forward.running)
                for output in engine.step():
                    got[output.request_id] = list(output.outputs[0].token_ids)
            engine.step()
            assert not forward.running
            assert any(running) == asynchronous
        found.append(got)
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0].values()] == [3, 9, 14, 20]


OTHERS: list[dict[str, Any]] = [
    {"seed": 1},
    {"temperature": 0, "seed": 1},
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.5},
    {"repetition_penalty": 1.5},
    {"min_p": 0.1},
    {"logit_bias": {5: 1.0}},
    {"allowed_token_ids": [5, 6, 7]},
    {"bad_words": ["Zen"]},
    {"logprobs": 0},
    {"logprob_token_ids": [5, 6], "logprobs": None},
    {"min_tokens": 8},
    {"extra_args": {"anything": 1}},
    {"structured_outputs": "choice"},
]


@pytest.mark.parametrize("params", OTHERS, ids=str)
def test_everything_else_goes_through_vllms_sampler(
    llm: Any, copied: list[tuple[int, ...]], params: dict[str, Any]
) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in params:
        params = {"structured_outputs": StructuredOutputsParams(choice=["sparse"])}
    answers(llm, made(**params), [LOOSE])
    assert copied
    assert {shape[0] for shape in copied} == {1}


def test_a_parameter_that_nobody_has_heard_of_is_vllms_business() -> None:
    from vllm import SamplingParams

    from vllm_moe_compat.backend.vllm import bridge, sampling

    known = sampling.APPLIED_FIELDS | bridge.NEUTRAL_SAMPLING_FIELDS
    assert known & set(SamplingParams().__struct_fields__) >= {"temperature", "top_k", "top_p", "n"}
    assert {"seed", "min_p", "logprobs", "structured_outputs"} <= set(sampling.DEFAULT_ONLY_FIELDS)
    for name in sampling.DEFAULT_ONLY_FIELDS:
        params = SamplingParams()
        assert sampling.is_plain(params)
        setattr(params, name, object())
        assert not sampling.is_plain(params), name


def test_of_a_mixed_batch_only_the_others_rows_are_copied(
    llm: Any, greedy: Greedy, copied: list[tuple[int, ...]]
) -> None:
    """Every request gets its own tokens, whatever the order of arrivals and ends."""
    params = [
        made(temperature=0, max_tokens=12),
        made(temperature=1.2, seed=11, max_tokens=5),
        made(temperature=1, top_k=1, max_tokens=16),
        made(temperature=0, logprobs=2, max_tokens=9),
        made(temperature=1, top_p=1e-6, max_tokens=3),
        made(temperature=0, repetition_penalty=1.0001, max_tokens=14),
        made(temperature=1.0, max_tokens=10),
    ]
    prompts = (PROMPTS * 2)[: len(params)]
    alone = answers(llm, params[1], [prompts[1]])[0]
    copied.clear()
    found = answers(llm, params, prompts)
    assert found[1] == alone
    for i in (0, 2, 3, 4, 5):
        prompt = llm.get_tokenizer().encode(prompts[i], add_special_tokens=False)
        assert found[i] == greedy.tokens(prompt, params[i].max_tokens), i
    # Three others at most, and until the longest of them ends.
    assert max(shape[0] for shape in copied) == 3
    assert len(copied) == 14


def test_seeded_tokens_are_those_of_vllms_own_formula(llm: Any, greedy: Greedy) -> None:
    """Softmax, exponential noise of the request's generator, the largest quotient."""
    import mlx.core as mx
    import torch

    prompt = llm.get_tokenizer().encode(LOOSE, add_special_tokens=False)
    generator = torch.Generator().manual_seed(1234)
    expected: list[int] = []
    for _ in range(8):
        logits = greedy.model(mx.array([prompt + expected]))[0, -1].astype(mx.float32)
        scores = torch.from_numpy(np.array(logits)) / 1.3
        noise = torch.empty_like(scores).exponential_(generator=generator)
        expected.append(int((scores.softmax(dim=-1) / noise).argmax()))
    params = made(temperature=1.3, seed=1234)
    assert answers(llm, params, [LOOSE]) == [expected]
    crowd = [made(temperature=1.0), params, made(temperature=0), params]
    found = answers(llm, crowd, [PROMPTS[0], LOOSE, PROMPTS[1], LOOSE])
    assert found[1] == found[3] == expected


def test_min_tokens_reached_makes_a_request_plain(
    llm: Any, greedy: Greedy, copied: list[tuple[int, ...]]
) -> None:
    prompt = llm.get_tokenizer().encode(PROMPTS[0], add_special_tokens=False)
    (found,) = answers(llm, made(temperature=0, min_tokens=5, max_tokens=12), [PROMPTS[0]])
    assert found == greedy.tokens(prompt, 12)
    assert len(copied) == 5


def test_an_engines_seed_repeats_what_its_requests_draw(demo_path: Path) -> None:
    runs = []
    for seed in (3, 3, 4):
        with in_process_llm(demo_path, seed=seed) as llm:
            first = answers(llm, made(temperature=1.5))
            runs.append((first, answers(llm, made(temperature=1.5))))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1], "draws go on, they do not start again"


def test_an_engines_own_logits_processor_sees_everyone(demo_path: Path) -> None:
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class Always7(LogitsProcessor):
        def __init__(self, *_: Any) -> None:
            """Nothing to set up."""

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            """Nothing to keep."""

        def apply(self, logits: Any) -> Any:
            logits[:, 7] = 1e4
            return logits

    with in_process_llm(demo_path, logits_processors=[Always7]) as llm:
        assert answers(llm, made(temperature=0), [LOOSE]) == [[7] * 8]
