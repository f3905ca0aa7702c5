"""Drafts change how many tokens a step gives, and nothing about the tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.sampling_table import LIKELY, VOCAB, Row, mixed, no_drafts, right, run, step
from vllm_moe_compat import demo
from vllm_moe_compat.backend.model.rows import TokenRows
from vllm_moe_compat.backend.step.batch import Request

TOKENS = 20
STOP = 3


@pytest.fixture(scope="module")
def config(demo_checkpoint: demo.DemoCheckpoint) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(demo_checkpoint.path), max_model_len=256, max_num_seqs=32, seed=5
    )
    config = copy.copy(arguments.create_engine_config())
    # It makes vLLM leave out logits processors.
    config.speculative_config = SimpleNamespace(num_speculative_tokens=4)
    return config


def sampler(config: Any, *processors: Any) -> Any:
    from vllm_moe_compat.backend.vllm.sampling import TokenSampler

    if processors:
        config = copy.copy(config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.logits_processors = list(processors)
        config.speculative_config = None
    return TokenSampler(config, TokenRows(VOCAB, VOCAB))


def params(**values: Any) -> Any:
    from vllm import SamplingParams

    made = SamplingParams(**({"max_tokens": 100} | values))
    # What vLLM's front end does.
    if made.bad_words:
        made._bad_words_token_ids = [[2], [4, 5], [1, 0]]
    made._all_stop_token_ids.update(made.stop_token_ids or ())
    return made


SEEDED = {"temperature": 1.0, "seed": 11}
EXACT: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seed": SEEDED,
    "seed, top-k": SEEDED | {"top_k": 5},
    "seed, top-p": SEEDED | {"top_p": 0.7, "temperature": 1.4},
    "seed, min-p": SEEDED | {"min_p": 0.2},
    "repetition": {"temperature": 0, "repetition_penalty": 1.7},
    "presence": SEEDED | {"presence_penalty": 1.5},
    "frequency": {"temperature": 0, "frequency_penalty": 1.1},
    "bias": {"temperature": 0, "logit_bias": {1: 2.5, 2: -100.0}},
    "min-tokens": {"temperature": 0, "min_tokens": 9, "stop_token_ids": list(range(6))},
    "bad words": SEEDED | {"bad_words": ["anything"]},
    "allowed": SEEDED | {"allowed_token_ids": [1, 3, 5, 7, 400]},
    "logprobs": SEEDED | {"logprobs": 3},
    "logprobs of one": {"temperature": 0, "logprobs": 0},
    "all logprobs": SEEDED | {"logprobs": -1},
    "grammar": SEEDED | {"top_k": 50},
    "grammar, greedy": {"temperature": 0},
}


def after_parity(output: Sequence[int]) -> Sequence[int]:
    """What a grammar allows: even and odd tokens in turn, and nothing twice in a row."""
    parity = len(output) % 2
    return [t for t in range(parity, LIKELY, 2) if not output or t not in output[-3:]]


def rows(kinds: dict[str, dict[str, Any]]) -> dict[str, Row]:
    made = {}
    for number, (name, values) in enumerate(kinds.items()):
        request = Request(name, [20 + number, 30], params(**values), [[1]], 2)
        made[name] = Row(request, TOKENS)
        if name.startswith("grammar"):
            made[name].allowed = after_parity
    return made


@pytest.fixture(scope="module")
def expected(config: Any) -> dict[str, Row]:
    """Each kind alone and without drafts."""
    made = rows(EXACT)
    for row in made.values():
        run(sampler(config), [row], no_drafts)
        assert len(row.tokens) == TOKENS
    assert not set(made["min-tokens"].tokens[:9]) & set(range(6))
    assert set(made["min-tokens"].tokens) & set(range(6))
    return made


DRAFTING = {
    "none": no_drafts,
    "all right": right(4),
    "first wrong": right(0, 500, 0, 1),
    "second wrong": right(1, 500, 501),
    "third wrong": right(2, 500),
    "mixed": mixed(1),
    "mixed otherwise": mixed(2),
}


def assert_same(row: Row, wanted: Row) -> None:
    name = row.request.req_id
    assert row.tokens[:TOKENS] == wanted.tokens, name
    assert not row.request.failed
    number = row.request.params.logprobs
    assert bool(row.logprobs) == (number is not None)
    for token, mine, theirs in zip(wanted.tokens, row.logprobs, wanted.logprobs, strict=False):
        assert mine[0][0] == token
        width = 1 + (VOCAB if number == -1 else number)
        np.testing.assert_array_equal(mine[0][:width], theirs[0][:width])
        np.testing.assert_allclose(mine[1][:width], theirs[1][:width], rtol=1e-6)
        assert mine[2] == theirs[2]


@pytest.mark.parametrize("drafting", DRAFTING)
def test_tokens_are_those_without_drafts(
    config: Any, expected: dict[str, Row], drafting: str
) -> None:
    """All kinds in one batch."""
    made = rows(EXACT)
    for name, row in made.items():
        row.known = expected[name].tokens
    counts = dict.fromkeys(made, 0)
    under_test = sampler(config)
    for _ in range(TOKENS):
        waiting = [row for row in made.values() if row.wanted]
        for row in waiting:
            counts[row.request.req_id] += 1
        step(under_test, waiting, DRAFTING[drafting])
    for name, row in made.items():
        assert_same(row, expected[name])
    # Nothing is drawn behind a token that ends a request.
    del counts["min-tokens"]
    if drafting == "all right":
        assert set(counts.values()) == {TOKENS // 5}
    if drafting in ("none", "first wrong"):
        assert set(counts.values()) == {TOKENS}
