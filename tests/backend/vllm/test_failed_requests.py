"""A failed request takes those with it that start behind its wrong pages, and nobody else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.vllm.failed_requests import FailedRequests

SIZES = [16, 64]


def request(name: str, first: list[int], second: list[int], computed: int = 0) -> Request:
    return Request(name, [1] * 40, SimpleNamespace(), [first, second], computed)


@pytest.fixture
def failed() -> FailedRequests:
    return FailedRequests()


def spread(failed: FailedRequests, *started: Request) -> list[str]:
    failed.spread(started, SIZES)
    return [one.req_id for one in started if one.failed]


def test_a_prefix_with_a_wrong_page_fails_with_the_same_reason(failed: FailedRequests) -> None:
    failed.fail(request("a", [1, 2, 3], [9]), "an expert", taints_pages=True)
    behind = request("b", [1, 2, 4], [8], computed=32)
    assert spread(failed, behind) == ["b"]
    assert failed.among(["b"])["b"].reason == "an expert"
    assert failed.among(["b"])["b"].pages == {1, 2, 4, 8}


def test_pages_that_were_right_before_the_failure_are_not_wrong(failed: FailedRequests) -> None:
    failed.fail(request("a", [1, 2, 3], [9]), "an expert", taints_pages=True, since=16)
    assert spread(failed, request("b", [1, 4], [8], computed=16)) == []
    assert spread(failed, request("c", [1, 2, 5], [7], computed=32)) == ["c"]


def test_only_the_pages_of_the_prefix_count(failed: FailedRequests) -> None:
    """A block that is given to another request to write is of no importance."""
    failed.fail(request("a", [1, 2, 3], [9]), "an expert", taints_pages=True)
    assert spread(failed, request("b", [4, 2], [8], computed=16)) == []


def test_the_second_group_counts_by_its_own_block_size(failed: FailedRequests) -> None:
    failed.fail(request("a", [1, 2, 3, 4, 5], [9, 10]), "x", taints_pages=True, since=70)
    assert spread(failed, request("b", [1, 2, 3, 4, 6], [9, 11], computed=64)) == []
    assert spread(failed, request("c", [11, 12, 13, 14, 15], [9, 10], computed=80)) == ["c"]


def test_failures_spread_through_requests_that_failed_behind_them(failed: FailedRequests) -> None:
    failed.fail(request("a", [1, 2], [9]), "x", taints_pages=True)
    last = request("c", [7, 5, 6], [11], computed=32)
    # Behind block 1, and the writer of block 5.
    middle = request("b", [1, 5], [10], computed=16)
    assert spread(failed, last, middle) == ["c", "b"]


def test_a_copy_of_a_wrong_page_is_wrong(failed: FailedRequests) -> None:
    failed.fail(request("a", [1, 2], [9]), "x", taints_pages=True)
    reader = request("b", [3, 4], [8], computed=20)
    failed.spread([reader], SIZES, [(2, 4)])
    assert reader.failed


def test_the_null_block_is_never_wrong(failed: FailedRequests) -> None:
    failed.fail(request("a", [0, 0, 3], [9]), "x", taints_pages=True)
    assert spread(failed, request("b", [0, 5], [8], computed=20)) == []


def test_what_has_ended_or_taints_nothing_spreads_no_more(failed: FailedRequests) -> None:
    failed.fail(request("a", [1], [9]), "x", taints_pages=True)
    failed.forget(["a"])
    failed.fail(request("d", [2], [8]), "no token is left", taints_pages=False)
    assert spread(failed, request("b", [1, 2], [9], computed=32)) == []
