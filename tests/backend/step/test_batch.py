"""Passes made from a schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moe_compat.backend.step import batch as batch_module
from vllm_moe_compat.backend.step.batch import Batch, Request
from vllm_moe_compat.backend.step.schedule import NewRequest, RunningRequest, Schedule

# Of the two KV groups that every request here has blocks of.
SIZES = [16, 4096]


def params() -> Any:
    return SimpleNamespace(prompt_logprobs=None)


def step(
    new: list[NewRequest] | None = None,
    running: list[RunningRequest] | None = None,
    scheduled: dict[str, int] | None = None,
    finished: set[str] | None = None,
) -> Schedule:
    return Schedule(
        frozenset(finished or ()), tuple(new or ()), tuple(running or ()), scheduled or {}, ()
    )


def prompt(req_id: str, length: int, computed: int = 0) -> NewRequest:
    return NewRequest(req_id, list(range(1, length + 1)), params(), ([1, 2, 3, 4], [5]), computed)


def test_a_prompts_last_token_joins_the_decodes():
    batch = Batch()
    batch.update(step(new=[prompt("a", 10)]))
    (prefill,) = batch.prefills({"a": 10}, SIZES)
    assert prefill.tokens.tolist() == [list(range(1, 10))]
    decode = batch.decodes(["a"], {"a": 10})
    assert decode.tokens.tolist() == [[10]]
    assert decode.offsets.tolist() == [9]


def test_an_unfinished_chunk_samples_nothing():
    batch = Batch()
    batch.update(step(new=[prompt("a", 10)]))
    assert not batch.samples("a", 6)
    (prefill,) = batch.prefills({"a": 6}, SIZES)
    assert prefill.lengths.tolist() == [6]


def test_a_prompt_of_one_token_needs_no_prefill():
    batch = Batch()
    batch.update(step(new=[prompt("a", 1)]))
    assert batch.prefills({"a": 1}, SIZES) == []
    assert batch.decodes(["a"], {"a": 1}).tokens.tolist() == [[1]]


def test_prompts_of_like_length_share_a_pass():
    batch = Batch()
    batch.update(step(new=[prompt("a", 200), prompt("b", 100), prompt("c", 150)]))
    (prefill,) = batch.prefills({"a": 200, "b": 100, "c": 150}, SIZES)
    assert prefill.req_ids == ["a", "c", "b"]
    assert prefill.tokens.shape == (3, 199)
    # With tokens of its own: those of others may be NaN.
    assert (prefill.tokens[2, 99:] == prefill.tokens[2, 0]).all()


def test_a_long_chunk_takes_several_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_module, "PASS_TOKENS_ON_CPU", 64)
    batch = Batch()
    batch.update(step(new=[prompt("a", 150, computed=10), prompt("b", 80)]))
    passes = batch.prefills({"a": 140, "b": 80}, SIZES)
    rows = [list(zip(work.req_ids, work.offsets, work.lengths, strict=True)) for work in passes]
    assert rows == [[("a", 10, 64), ("b", 0, 64)], [("a", 74, 64), ("b", 64, 15)], [("a", 138, 11)]]
    assert passes[1].tokens[1, :15].tolist() == list(range(65, 80))


def test_padding_never_more_than_doubles_a_long_pass():
    batch = Batch()
    lengths = {"long": 2001, "s1": 4, "s2": 5, "s3": 6, "s4": 3}
    batch.update(step(new=[prompt(req_id, n) for req_id, n in lengths.items()]))
    passes = batch.prefills(lengths, SIZES)
    for work in passes:
        assert work.tokens.size <= max(2 * work.lengths.sum(), 256)
    counts = dict.fromkeys(lengths, 0)
    for work in passes:
        for req_id, count in zip(work.req_ids, work.lengths, strict=True):
            counts[req_id] += count
    assert counts == {req_id: length - 1 for req_id, length in lengths.items()}


def behind(req_id: str, blocks: list[int], length: int, computed: int = 0) -> NewRequest:
    return NewRequest(req_id, list(range(1, length + 1)), params(), (blocks, [50]), computed)


def test_a_prefix_computed_in_the_same_step_comes_in_an_earlier_pass():
    batch = Batch()
    new = [
        behind("a", [1, 2], 32),  # whole blocks: its last token is waited for
        behind("b", [1, 2, 3, 4], 64, computed=32),  # the same, by c
        behind("c", [1, 2, 3, 4, 5], 70, computed=64),
        behind("d", [1, 6], 20, computed=16),  # only a's first block
        behind("e", [7, 8], 32),  # of no other request
    ]
    batch.update(step(new=new))
    scheduled = {"a": 32, "b": 32, "c": 6, "d": 4, "e": 32}
    passes = batch.prefills(scheduled, SIZES)
    rows = [list(zip(work.req_ids, work.lengths.tolist(), strict=True)) for work in passes]
    assert rows == [[("a", 32), ("e", 31)], [("b", 32), ("d", 3)], [("c", 5)]]
    # Every request is sampled all the same.
    assert batch.decodes(list(scheduled), scheduled).offsets.tolist() == [31, 63, 69, 19, 31]


def test_a_prefix_from_an_earlier_step_needs_no_later_pass():
    batch = Batch()
    batch.update(step(new=[behind("a", [1, 2, 3], 40)]))
    batch.prefills({"a": 40}, SIZES)
    batch.update(step(new=[behind("b", [1, 2, 4], 40, computed=32), behind("c", [5], 9)]))
    (prefill,) = batch.prefills({"b": 8, "c": 9}, SIZES)
    assert prefill.req_ids == ["c", "b"]


def test_a_resumed_request_waits_for_a_prefix_of_the_same_step():
    batch = Batch()
    batch.update(step(new=[behind("a", [1, 2, 3], 40)]))
    resumed = RunningRequest("a", 32, 0, ([4, 5, 6], [50]), True)
    batch.update(step(new=[behind("b", [4, 5], 32)], running=[resumed]))
    passes = batch.prefills({"b": 32, "a": 8}, SIZES)
    assert [work.req_ids for work in passes] == [["b"], ["a"]]
    assert passes[0].lengths.tolist() == [32]


def test_tables_are_as_wide_as_the_longest_row_and_padded_with_the_null_block():
    batch = Batch()
    batch.update(step(new=[prompt("a", 40), prompt("b", 20)]))
    (prefill,) = batch.prefills({"a": 40, "b": 20}, SIZES)
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


def test_blocks_that_no_single_pass_fills_have_to_be_zeroed():
    batch = Batch()
    new = [
        behind("chunk", [1, 2, 3], 48),  # ends inside its second block
        behind("whole", [4, 5], 40),  # ends at a block's edge, before the prompt does
        behind("last", [6, 7], 32),  # the last token comes in a pass of its own
        behind("decode", [8, 9], 33, computed=32),  # begins its third block
        behind("inside", [10, 11], 30, computed=20),  # its last block was begun earlier
    ]
    new[3].blocks[0].append(12)
    batch.update(step(new=new))
    scheduled = {"chunk": 20, "whole": 32, "last": 32, "decode": 1, "inside": 10}
    assert batch.partial_blocks(scheduled, {0: 16}) == {0: [2, 7, 12]}


def test_blocks_between_two_passes_of_a_chunk_have_to_be_zeroed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_module, "PASS_TOKENS_ON_CPU", 24)
    batch = Batch()
    # Passes end at 32, 56 and 80, in the third of which block 5 ends too; the first block was
    # begun in an earlier step.
    batch.update(step(new=[behind("a", [1, 2, 3, 4, 5, 6], 90, computed=8)]))
    assert batch.partial_blocks({"a": 80}, {0: 16}) == {0: [4, 6]}
    # And at 30, which is inside the block begun before.
    batch.update(step(new=[behind("b", [7, 8, 9], 40, computed=20)], finished={"a"}))
    monkeypatch.setattr(batch_module, "PASS_TOKENS_ON_CPU", 10)
    assert batch.partial_blocks({"b": 12}, {0: 16}) == {0: []}
