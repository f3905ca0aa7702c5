"""Who computes what: passes made from a schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm_moe_compat.backend.batch import Batch, Request
from vllm_moe_compat.backend.scheduler_output import NewRequest, RunningRequest, Step


def params() -> Any:
    return SimpleNamespace(prompt_logprobs=None)


def step(
    new: list[NewRequest] | None = None,
    running: list[RunningRequest] | None = None,
    scheduled: dict[str, int] | None = None,
    finished: set[str] | None = None,
) -> Step:
    return Step(
        frozenset(finished or ()), tuple(new or ()), tuple(running or ()), scheduled or {}, ()
    )


def prompt(req_id: str, length: int, computed: int = 0) -> NewRequest:
    return NewRequest(req_id, list(range(1, length + 1)), params(), ([1, 2, 3, 4], [5]), computed)


def test_a_prompts_last_token_joins_the_decodes():
    batch = Batch()
    batch.update(step(new=[prompt("a", 10)]))
    (prefill,) = batch.prefills({"a": 10})
    assert prefill.tokens.tolist() == [list(range(1, 10))]
    decode = batch.decodes(["a"], {"a": 10})
    assert decode.tokens.tolist() == [[10]]
    assert decode.offsets.tolist() == [9]


def test_an_unfinished_chunk_samples_nothing():
    batch = Batch()
    batch.update(step(new=[prompt("a", 10)]))
    assert not batch.samples("a", 6)
    (prefill,) = batch.prefills({"a": 6})
    assert prefill.lengths.tolist() == [6]


def test_a_prompt_of_one_token_needs_no_prefill():
    batch = Batch()
    batch.update(step(new=[prompt("a", 1)]))
    assert batch.prefills({"a": 1}) == []
    assert batch.decodes(["a"], {"a": 1}).tokens.tolist() == [[1]]


def test_prompts_of_like_length_share_a_pass():
    batch = Batch()
    batch.update(step(new=[prompt("a", 300), prompt("b", 200), prompt("c", 250)]))
    (prefill,) = batch.prefills({"a": 300, "b": 200, "c": 250})
    assert prefill.req_ids == ["a", "c", "b"]
    assert prefill.tokens.shape == (3, 299)
    assert not prefill.tokens[2, 199:].any()


def test_padding_never_more_than_doubles_a_long_pass():
    batch = Batch()
    lengths = {"long": 2001, "s1": 4, "s2": 5, "s3": 6, "s4": 3}
    batch.update(step(new=[prompt(req_id, n) for req_id, n in lengths.items()]))
    passes = batch.prefills(lengths)
    for work in passes:
        assert work.tokens.size <= max(2 * work.lengths.sum(), 256)
    assert sorted(i for work in passes for i in work.req_ids) == sorted(lengths)


def test_tables_are_as_wide_as_the_longest_row_and_padded_with_the_null_block():
    batch = Batch()
    batch.update(step(new=[prompt("a", 40), prompt("b", 20)]))
    (prefill,) = batch.prefills({"a": 40, "b": 20})
    assert prefill.tables(0, 16).tolist() == [[1, 2, 3], [1, 2, 0]]


def test_tokens_run_across_prompt_and_output():
    request = Request("a", [1, 2, 3], params(), [[1]], 0, [4, 5])
    assert request.tokens(1, 4) == [2, 3, 4, 5]
    assert request.tokens(0, 2) == [1, 2]
    assert request.tokens(3, 2) == [4, 5]


def test_new_blocks_are_appended_and_a_resumed_requests_are_replaced():
    batch = Batch()
    batch.update(step(new=[prompt("a", 10)]))
    batch.requests["a"].output.extend([7, 8])
    lost = batch.update(step(running=[RunningRequest("a", 11, 2, ([9], []), False)]))
    assert batch.requests["a"].blocks == [[1, 2, 3, 4, 9], [5]]
    assert lost == set()
    lost = batch.update(step(running=[RunningRequest("a", 0, 1, ([6], [7]), True)]))
    assert batch.requests["a"].blocks == [[6], [7]]
    assert lost == {"a"}
    assert batch.requests["a"].output == [7], "what the scheduler discarded is gone"


def test_an_id_may_end_and_begin_in_one_step():
    batch = Batch()
    batch.update(step(new=[prompt("a", 10)]))
    lost = batch.update(step(new=[prompt("a", 4)], finished={"a"}))
    assert lost == {"a"}
    assert batch.requests["a"].num_tokens == 4
