"""Who gets drafts for the next step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moe_compat import envs
from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.drafting import Always, Drafting, lengths_of
from vllm_moe_compat.backend.step.ngram import NgramDrafter
from vllm_moe_compat.backend.step.parking import Parking


def make_request(req_id: str, prompt: list[int], max_tokens: int | None = 16) -> Request:
    params: Any = SimpleNamespace(max_tokens=max_tokens)
    return Request(req_id, prompt, params, [], 0)


REPEATS, NEW = [1, 2, 3, 4, 5, 1, 2], [1, 2, 3, 4]


def test_no_more_is_proposed_than_a_request_can_take() -> None:
    drafting = Drafting(NgramDrafter(2, 3, 100), Always(3))
    lengths = [2, 3, 16, None]
    drafting.propose([make_request(f"r{n}", REPEATS, n) for n in lengths])
    assert drafting.take() == {"r2": [3], "r3": [3, 4], "r16": [3, 4, 5], "rNone": [3, 4, 5]}
    assert drafting.take() == {}
    assert not drafting.idle


def test_who_gets_none_is_told_too() -> None:
    drafting = Drafting(NgramDrafter(2, 3, 100), Always(2))
    drafting.propose([make_request("new", NEW), make_request("repeats", REPEATS)])
    assert drafting.take() == {"new": [], "repeats": [3, 4]}


def test_it_is_decided_again_once_it_is_known_for_whom_there_are_drafts() -> None:
    """A few drafts of one request are not worth the width of all rows."""
    parking = Parking(4)
    drafting = Drafting(NgramDrafter(2, 3, 100), parking)
    requests = [*(make_request(f"new{i}", NEW) for i in range(7)), make_request("a", REPEATS)]
    for drafts, seconds in [(0, 1.0)] * 4 + [(4, 2.0)] * 4:
        parking.observe(requests, [drafts] * 8, [drafts] * 8, seconds)
    drafting.propose(requests)
    assert not drafting.idle
    assert drafting.take()["a"] == []
    repeating = [make_request(f"b{i}", REPEATS) for i in range(8)]
    drafting.propose(repeating)
    assert list(drafting.take().values()) == [[3, 4, 5, 1]] * 8


def test_parking_can_be_switched_off() -> None:
    with envs.override({"VLLM_MOE_COMPAT_PARK_DRAFTS": "0"}):
        assert isinstance(lengths_of(3), Always)
    assert isinstance(lengths_of(3), Parking)


@pytest.mark.parametrize("park", ["0", "1"])
def test_nothing_is_kept_of_requests_that_ended(park: str) -> None:
    with envs.override({"VLLM_MOE_COMPAT_PARK_DRAFTS": park}):
        drafting = Drafting(drafter := NgramDrafter(2, 3, 100), lengths := lengths_of(3))
    for number in range(20):
        request = make_request(f"r{number}", REPEATS)
        drafting.observe([request], [0], 1.0)
        drafting.propose([request])
        drafting.forget(request.req_id)
    assert not drafter._contexts
    assert not isinstance(lengths, Parking) or not lengths.acceptance.kept
