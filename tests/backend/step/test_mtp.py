"""The drafter of prediction heads follows prompts, accepted drafts, pauses and preemptions.

The target's hidden states are a fixed function of request and position, garbage where a draft is
discarded, so a position that is missed, seen twice or seen too early changes the drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from support import heads as small
from support import hybrid
from vllm_moe_compat.backend.step import mtp
from vllm_moe_compat.backend.step.batch import Pass, Request, make_pass
from vllm_moe_compat.backend.step.head_passes import HeadPasses
from vllm_moe_compat.backend.step.mtp import MtpDrafter

MOST = 3
LONGEST = 1024


@pytest.fixture(scope="module")
def heads() -> Any:
    return small.RandomHeads(hybrid.model())


@pytest.fixture
def drafter(heads: Any) -> Any:
    passes = HeadPasses(heads, small.storage(heads, 8 << 20), small.VOCABULARY)
    made = MtpDrafter(passes, LONGEST)
    yield made
    made.suspend()


def hidden_of(work: Pass) -> mx.array:
    """What the target returns: garbage where no token is known, and in the padding."""
    out = []
    for request, start, length in zip(work.requests, work.offsets, work.lengths, strict=True):
        real = small.hidden_states(request, int(start + length))[int(start) :]
        known = max(0, min(int(length), request.num_tokens - int(start)))
        garbage = mx.full((work.tokens.shape[1] - known, small.HIDDEN), 7.0)
        out.append(mx.concatenate([real[:known], garbage]))
    return mx.stack(out)


def compute(drafter: MtpDrafter, rows: Sequence[tuple[Request, int, int]]) -> None:
    """A pass over known tokens."""
    work = make_pass(rows)
    drafter.follow(work, hidden_of(work))


def prompts(drafter: MtpDrafter, requests: Sequence[Request]) -> None:
    rows = [(request, 0, request.num_tokens - 1) for request in requests]
    compute(drafter, [row for row in rows if row[2]])


def draw(
    drafter: MtpDrafter,
    requests: Sequence[Request],
    accepted: Sequence[int],
    *,
    hidden: bool = True,
) -> None:
    """A pass over the last token and ``MOST`` drafts of each, of which some are accepted.

    The hidden states of those that are not are garbage: those of accepted ones are known before
    the pass here, since they depend on the position only.
    """
    random = np.random.default_rng(requests[0].num_tokens)
    lengths = np.full(len(requests), 1 + MOST)
    offsets = np.asarray([request.num_tokens - 1 for request in requests], dtype=np.int64)
    tokens = np.zeros((len(requests), 1 + MOST), dtype=np.int32)
    work = Pass(tuple(requests), tokens, offsets, lengths)
    before = [list(request.output) for request in requests]
    for request, count in zip(requests, accepted, strict=True):
        request.output += [int(t) for t in random.integers(0, small.VOCABULARY, count)]
    states = hidden_of(work)
    after = [request.output for request in requests]
    for request, output in zip(requests, before, strict=True):
        request.output = output
    drafter.follow(work, states if hidden else None)
    for request, output in zip(requests, after, strict=True):
        request.output = [*output, int(random.integers(0, small.VOCABULARY))]


def assert_drafts(drafter: MtpDrafter, requests: Sequence[Request], heads: Any) -> None:
    expected = [small.reference(heads, request, MOST) for request in requests]
    assert drafter.propose(requests, MOST) == expected


def test_every_pattern_of_accepted_drafts(heads: Any, drafter: MtpDrafter) -> None:
    requests = hybrid.requests([13, 30, 1, 4])
    prompts(drafter, requests)
    random = np.random.default_rng(1)
    for _ in range(8):
        draw(drafter, requests, random.integers(0, MOST + 1, len(requests)).tolist())
        assert_drafts(drafter, requests, heads)


def test_prompts_in_chunks_beside_requests_that_draw(heads: Any, drafter: MtpDrafter) -> None:
    first, second = hybrid.requests([13, 40])
    prompts(drafter, [first])
    for start in (0, 10, 20, 30):
        compute(drafter, [(second, start, 9 if start == 30 else 10)])
        draw(drafter, [first], [1])
        assert_drafts(drafter, [first], heads)
    draw(drafter, [first, second], [2, 0])
    assert_drafts(drafter, [first, second], heads)


def test_the_last_token_of_a_prompt_is_computed_twice(heads: Any, drafter: MtpDrafter) -> None:
    """As where another request's prefix includes it: its next token is unknown the first time."""
    (request,) = hybrid.requests([20])
    compute(drafter, [(request, 0, 20)])
    draw(drafter, [request], [0])
    assert_drafts(drafter, [request], heads)


@pytest.mark.parametrize("steps", [3, mtp.MOST_UNSEEN, 2 * mtp.MOST_UNSEEN + 5])
def test_a_pause_is_caught_up_with(heads: Any, drafter: MtpDrafter, steps: int) -> None:
    paused, other = hybrid.requests([13, 30], room=200)
    prompts(drafter, [paused, other])
    for step in range(steps):
        draw(drafter, [paused, other], [0, 0])
        found = drafter.propose([other], MOST)
        if step % 30 == 0:
            assert found == [small.reference(heads, other, MOST)]
    waiting = drafter._followed[paused.req_id].parts
    # The positions of one verified pass come on top.
    assert 0 < sum(map(len, waiting)) <= mtp.MOST_UNSEEN + 1 + MOST
    assert len(waiting) <= mtp.MOST_PARTS
    draw(drafter, [paused, other], [0, 2])
    assert_drafts(drafter, [paused, other], heads)
    draw(drafter, [paused, other], [1, 0])
    assert_drafts(drafter, [paused, other], heads)


def test_a_pass_without_hidden_states_leaves_a_gap(heads: Any, drafter: MtpDrafter) -> None:
    requests = hybrid.requests([13, 30])
    prompts(drafter, requests)
    paused, other = requests
    draw(drafter, [paused], [0], hidden=False)
    draw(drafter, requests, [0, 0])
    assert drafter.propose(requests, MOST) == [[], small.reference(heads, other, MOST)]
    # Computed anew after a preemption, it has all positions again.
    drafter.forget(paused.req_id)
    prompts(drafter, [paused])
    draw(drafter, [paused], [0])
    assert_drafts(drafter, [paused], heads)


def test_a_request_behind_the_prefix_of_another(heads: Any, drafter: MtpDrafter) -> None:
    first, second = hybrid.requests([2 * hybrid.BLOCK + 5, 2 * hybrid.BLOCK + 9])
    # Equal hidden states, as of an equal prefix.
    second.req_id = first.req_id + " "
    prefix = 2 * hybrid.BLOCK
    second.prompt[: prefix + 1] = first.prompt[: prefix + 1]
    second.blocks[1][:2] = first.blocks[1][:2]

    def states(request: Request, count: int) -> mx.array:
        return original(first, count)

    original = small.hidden_states
    with pytest.MonkeyPatch.context() as equal:
        equal.setattr(small, "hidden_states", states)
        prompts(drafter, [first])
        compute(drafter, [(second, prefix, second.num_tokens - 1 - prefix)])
        draw(drafter, [first, second], [1, 3])
        assert_drafts(drafter, [first, second], heads)


def test_fewer_drafts_at_the_end_of_the_sequence_and_of_its_blocks(
    heads: Any, drafter: MtpDrafter
) -> None:
    short, full = hybrid.requests([13, 30])
    full.blocks[1] = full.blocks[1][:2]
    drafter._max_model_len = 17
    prompts(drafter, [short])
    draw(drafter, [short], [0])
    assert short.num_tokens == 14
    assert [len(tokens) for tokens in drafter.propose([short], 5)] == [3]
    drafter._max_model_len = LONGEST
    prompts(drafter, [full])
    draw(drafter, [full], [0])
    assert full.num_tokens == 31
    # Slots 29, 30 and 31 of two blocks of 16.
    assert drafter.propose([full], 5) == [small.reference(heads, full, 3)]


def test_a_request_that_failed_gets_none(heads: Any, drafter: MtpDrafter) -> None:
    requests = hybrid.requests([13, 30])
    prompts(drafter, requests)
    requests[0].failed = True
    draw(drafter, requests, [0, 0])
    assert drafter.propose(requests, MOST) == [[], small.reference(heads, requests[1], MOST)]


@pytest.mark.parametrize("where", ["prompt", "drafts"])
def test_heads_that_fail_are_told_once_and_not_asked_again(
    drafter: MtpDrafter,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("a wrong shape")

    requests = hybrid.requests([13, 30])
    if where == "drafts":
        prompts(drafter, requests)
    monkeypatch.setattr(small.RandomHeads, "decode", fail)
    with caplog.at_level(logging.ERROR, logger="vllm_moe_compat"):
        if where == "prompt":
            prompts(drafter, requests)
        for _ in range(2):
            draw(drafter, requests, [0, 0])
            assert drafter.propose(requests, MOST) == [[], []]
    (record,) = [r for r in caplog.records if "a wrong shape" in r.getMessage()]
    assert "requests go on without" in record.getMessage()


def test_other_weights_after_a_pause_of_all(heads: Any, drafter: MtpDrafter) -> None:
    requests = hybrid.requests([13, 30])
    prompts(drafter, requests)
    drafter.suspend()
    other = small.RandomHeads(hybrid.model(), seed=2)
    drafter.resume(other)
    prompts(drafter, requests)
    draw(drafter, requests, [0, 0])
    assert_drafts(drafter, requests, other)
