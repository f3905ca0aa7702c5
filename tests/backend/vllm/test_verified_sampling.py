"""Drafts change how many tokens a step gives, and nothing about the tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from support.frequencies import agrees
from support.sampling_table import LIKELY, VOCAB, Row, mixed, no_drafts, right, run, step, table
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
    config.reasoning_config = SimpleNamespace(
        reasoning_start_token_ids=[1], reasoning_end_token_ids=[6, 2, 5]
    )
    return config


def sampler(config: Any, *processors: Any) -> Any:
    from vllm_moe_compat.backend.vllm.sampling import TokenSampler

    if processors:
        config = copy.copy(config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.logits_processors = list(processors)
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
    "min-tokens": {"temperature": 0, "min_tokens": 11, "stop_token_ids": list(range(6))},
    "bad words": SEEDED | {"bad_words": ["anything"]},
    "allowed": SEEDED | {"allowed_token_ids": [1, 3, 5, 7, 400]},
    "logprobs": SEEDED | {"logprobs": 3},
    "logprobs of one": {"temperature": 0, "logprobs": 0},
    "all logprobs": SEEDED | {"logprobs": -1},
    "thinking": SEEDED | {"logit_bias": {1: 2.0}, "thinking_token_budget": 3},
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
    assert not set(made["min-tokens"].tokens[:11]) & set(range(6))
    assert made["min-tokens"].tokens[11] in range(6)
    thought = made["thinking"].tokens
    begin = thought.index(1)
    assert thought[begin + 4 : begin + 7] == [6, 2, 5]
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


def plain(name: str, **values: Any) -> Row:
    return Row(Request(name, [9, 10], params(**values), [[1]], 2), 1)


LAWS: dict[str, dict[str, Any]] = {
    "in MLX": {"temperature": 1.0},
    "in MLX, top-p": {"temperature": 0.8, "top_p": 0.8},
    "in MLX, top-k": {"temperature": 1.0, "top_k": 4},
    "in MLX, a k that is not sorted": {"temperature": 1.0, "top_k": 5},
    "on the host": {"temperature": 1.0, "logprobs": 0},
    "on the host, top-p": {"temperature": 0.8, "top_p": 0.8, "min_p": 1e-3},
}


def law(values: dict[str, Any], tokens: Sequence[int]) -> Any:
    """Probabilities after ``tokens`` by vLLM's own masks."""
    import torch
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    scores = torch.from_numpy(table(tokens)[None]) / values["temperature"]
    if "min_p" in values:
        scores[scores.softmax(-1) < values["min_p"] * scores.softmax(-1).max()] = -torch.inf
    k = torch.tensor([values["top_k"]]) if "top_k" in values else None
    p = torch.tensor([values["top_p"]]) if "top_p" in values else None
    return apply_top_k_top_p_pytorch(scores, k, p).softmax(-1, dtype=torch.float64)[0].numpy()


@pytest.mark.parametrize("name", LAWS)
def test_draws_follow_the_models_distribution(
    config: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind an accepted draft, which is accepted with its own probability."""
    from vllm_moe_compat.backend.step import mlx_sampling

    if "not sorted" in name:  # Then every row is undecided at first.
        monkeypatch.setattr(mlx_sampling, "MAX_SORTED_TOP_K", 4)
    values = LAWS[name]
    # The second likeliest tokens.
    first = int(np.argsort(law(values, [9, 10]))[-2])
    second = int(np.argsort(law(values, [10, first]))[-2])
    under_test = sampler(config)
    drawn: list[list[int]] = []
    for turn in range(60):
        rows = [plain(f"{turn}-{i}", **values) for i in range(30)]
        step(under_test, rows, lambda _: [first, second])
        drawn += [row.tokens for row in rows]
        under_test.forget({row.request.req_id for row in rows})
    assert {len(tokens) for tokens in drawn} == {1, 2, 3}
    for prefix in ([], [first], [first, second]):
        at = len(prefix)
        reached = [tokens[at] for tokens in drawn if tokens[:at] == prefix and len(tokens) > at]
        wanted = law(values, [9, 10, *prefix])
        agrees(np.bincount(reached, minlength=VOCAB), wanted)
        # Nothing else ends a request's step.
        assert len(reached) == sum(tokens[:at] == prefix for tokens in drawn)


BAD = 440
"""A token behind which the table has no numbers."""


def spoilt(tokens: Sequence[int]) -> Any:
    return np.full(VOCAB, np.nan, dtype=np.float32) if tokens[-1] == BAD else table(tokens)


def to_bad(tokens: Sequence[int]) -> Any:
    """The third token is ``BAD``."""
    logits = table(tokens)
    if len(tokens) == 4:
        logits[BAD] = 100
    return spoilt(tokens) if tokens[-1] == BAD else logits


@pytest.mark.parametrize("values", [{"temperature": 0}, SEEDED, SEEDED | {"logprobs": 1}], ids=str)
def test_logits_that_are_not_finite_fail_a_request_only_where_they_count(
    config: Any, values: dict[str, Any]
) -> None:
    unharmed, harmed, other = (plain(name, **values) for name in ("unharmed", "harmed", "other"))
    alone = plain("alone", **values)
    for row in (unharmed, other, alone):
        row.count = 6
    harmed.count, harmed.model, unharmed.model = 6, to_bad, spoilt
    run(sampler(config), [alone], no_drafts)
    under_test = sampler(config)

    def drafts(row: Row) -> list[int]:
        if row is harmed:
            return [*alone.tokens[:2], BAD, 1, 2][len(row.tokens) :]
        return [BAD, 1] if row is unharmed else []

    run(under_test, [harmed, other, unharmed], drafts)
    assert unharmed.tokens == other.tokens == alone.tokens
    assert not unharmed.request.failed
    assert harmed.request.failed
    assert "NaN or infinite" in under_test.failed.among(["harmed"])["harmed"].reason
    # What it got before stays.
    assert harmed.tokens == [*alone.tokens[:2], BAD]


def test_a_position_that_is_drawn_again_is_drawn_from_the_same_noise(config: Any) -> None:
    """Logits of several tokens may overflow where those of one do not."""
    row, alone = plain("row", **SEEDED, logprobs=1), plain("alone", **SEEDED, logprobs=1)
    row.count = alone.count = 6
    run(sampler(config), [alone], no_drafts)
    under_test = sampler(config)
    row.model = lambda tokens: table(tokens) * (np.nan if len(tokens) > 2 else 1)
    step(under_test, [row], lambda _: alone.tokens[:3])
    assert row.tokens == alone.tokens[:1]
    row.model = table
    run(under_test, [row], no_drafts)
    assert row.tokens == alone.tokens


def counting() -> Any:
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    class Counting(LogitsProcessor):
        """Allows another third of the tokens at each call, and raises at a request's wish."""

        def __init__(self, *_: Any) -> None:
            self.requests: dict[int, Any] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            def begin(params: Any, prompt: Any, output: Any) -> Any:
                if (params.extra_args or {}).get("counts"):
                    return {"calls": 0, "params": params, "output": output}
                return None

            process_dict_updates(self.requests, batch_update, begin)

        def apply(self, logits: Any) -> Any:
            for row, request in self.requests.items():
                if len(request["output"]) == request["params"].extra_args.get("raises at"):
                    raise ArithmeticError("as it was asked to")
                call, request["calls"] = request["calls"], request["calls"] + 1
                kept = logits[row, call % 3 :: 3].clone()
                logits[row] = -float("inf")
                logits[row, call % 3 :: 3] = kept
            return logits

    return Counting


@pytest.mark.parametrize("drafting", ["all right", "second wrong", "mixed"])
def test_a_foreign_processor_is_called_once_per_token(config: Any, drafting: str) -> None:
    """Its requests come and go at different times, so rows move."""

    def made() -> list[Row]:
        rows = [
            plain(f"{i}", temperature=1.0, seed=i, extra_args={"counts": i % 3 != 2})
            for i in range(7)
        ]
        for i, row in enumerate(rows):
            row.count = [20, 3, 14, 6, 20, 9, 11][i]
        return rows

    kind = counting()
    expected = made()
    for row in expected:
        run(sampler(config, kind), [row], no_drafts)
    for row in expected:
        if row.request.params.extra_args["counts"]:
            assert [token % 3 for token in row.tokens] == [i % 3 for i in range(row.count)]
    rows = made()
    under_test = sampler(config, kind)
    for row, one in zip(rows, expected, strict=True):
        row.known = one.tokens
    for turn in range(30):
        arrived = rows[: 2 + turn]
        step(under_test, [row for row in arrived if row.wanted], DRAFTING[drafting])
        under_test.forget({row.request.req_id for row in arrived if not row.wanted})
    for row, one in zip(rows, expected, strict=True):
        assert row.tokens[: row.count] == one.tokens, row.request.req_id


def test_an_error_of_a_processor_fails_its_request_at_the_same_token(config: Any) -> None:
    kind = counting()
    wish = {"counts": True, "raises at": 5}
    alone = [
        plain("raises", temperature=1.0, seed=1, extra_args=wish),
        plain("sound", temperature=1.0, seed=2, extra_args={"counts": False}),
    ]
    for row in alone:
        row.count = 12
        run(sampler(config, kind), [row], no_drafts)
    assert alone[0].request.failed
    assert len(alone[0].tokens) == 5
    rows = [
        plain("raises", temperature=1.0, seed=1, extra_args=wish),
        plain("sound", temperature=1.0, seed=2, extra_args={"counts": False}),
    ]
    for row, one in zip(rows, alone, strict=True):
        row.count, row.known = 12, one.tokens
    run(sampler(config, kind), rows, right(3))
    assert [row.request.failed for row in rows] == [True, False]
    assert rows[0].tokens == alone[0].tokens
    assert rows[1].tokens[:12] == alone[1].tokens


@pytest.mark.parametrize("values", [{"temperature": 0}, SEEDED | {"repetition_penalty": 1.5}])
def test_tokens_of_another_rank_replace_those_drawn_here(
    config: Any, values: dict[str, Any]
) -> None:
    """Whether they are more or fewer, the request goes on as if it had drawn them."""
    followed, expected = plain("followed", **values), plain("expected", **values)
    under_test = sampler(config)
    for theirs in ([4, 4, 7], [5], [4, 2, 2, 2]):
        step(under_test, [followed], lambda _: [1, 2, 3])
        under_test.replace(followed.request, theirs)
        assert followed.request.output[-len(theirs) :] == theirs
    row = under_test._host.batch
    if "seed" in values:
        end = int(row.num_tokens_no_spec[0])
        assert row.token_ids_cpu[0, :end].tolist() == [9, 10, 4, 4, 7, 5, 4, 2, 2, 2]
    expected.request.output += followed.request.output
    followed.request.params = expected.request.params = params(
        temperature=0, **{k: v for k, v in values.items() if k == "repetition_penalty"}
    )
    under_test.forget({"followed"})
    for one, row in ((under_test, followed), (sampler(config), expected)):
        row.tokens.clear()
        row.count = 5
        run(one, [row], no_drafts)
    assert followed.tokens == expected.tokens


def test_requests_without_tokens_have_no_log_probabilities_to_cut(config: Any) -> None:
    """vLLM's scheduler looks them up for every request of a step that wants any."""
    wants, chunk = plain("wants", logprobs=2, **SEEDED), 3
    under_test = sampler(config)
    wants.request.drafts = [1, 2]
    under_test.select([wants.request])
    scheduled: Any = SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(["wants", "chunk", "another"], chunk),
        scheduled_spec_decode_tokens={"wants": [1, 2]},
    )
    logits = np.stack([np.eye(VOCAB, dtype=np.float32)[i] * 1e4 for i in (1, 2, 3)])
    _, tokens, logprobs = under_test.verify(mx.array(logits), scheduled, None)
    assert tokens == [[1, 2, 3]]
    assert logprobs.slice_request(0, 3).logprob_token_ids[:, 0].tolist() == [1, 2, 3]
    for index in (1, 2):
        assert len(logprobs.slice_request(index, 0).logprobs) == 0


def test_drafts_that_are_not_verified_have_masks_all_the_same(config: Any) -> None:
    """vLLM schedules placeholders for drafts, and sends masks for them."""
    from vllm.v1.core.sched.output import GrammarOutput

    rows = [plain(name, **SEEDED) for name in ("a", "b")]
    for row in rows:
        row.allowed = lambda output: [7]
    requests = [row.request for row in rows]
    under_test = sampler(config)
    order = under_test.select(requests)
    free = [-np.ones(VOCAB // 32, dtype=np.int32)] * 2
    masks = np.stack([rows[0].masks()[0], *free, rows[1].masks()[0], *free])
    scheduled: Any = SimpleNamespace(
        num_scheduled_tokens={"a": 3, "b": 3},
        scheduled_spec_decode_tokens={"a": [-1, -1], "b": [-1, -1]},
    )
    logits = mx.zeros((2, VOCAB))
    found, tokens, _ = under_test.verify(logits, scheduled, GrammarOutput(["a", "b"], masks))
    assert found == order
    assert tokens == [[7], [7]]


def test_a_mask_goes_with_its_request(config: Any) -> None:
    """It does not bind the request that takes its place in the batch."""
    under_test = sampler(config)
    first, bound, free = (
        plain(name, temperature=0, repetition_penalty=1.01) for name in ("first", "bound", "free")
    )
    bound.request.params.allowed_token_ids = [400, 401]
    step(under_test, [first, bound], no_drafts)
    step(under_test, [bound], no_drafts)
    step(under_test, [bound, free], no_drafts)
    assert set(bound.tokens) <= {400, 401}
    assert free.tokens == first.tokens[:1]
    assert free.tokens[0] < LIKELY
