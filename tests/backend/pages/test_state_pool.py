"""States: rows that move, pages that last, and whose they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from vllm_moe_compat.backend.model.rows import TokenRows
from vllm_moe_compat.backend.pages.layers import StateLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.state_pool import StatePool
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step import kept_states
from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.schedule import NewRequest, Schedule
from vllm_moe_compat.backend.vllm.runner import ModelRunner

BLOCK = 4
PARAMS = SimpleNamespace(prompt_logprobs=None)


def storage(dtype: mx.Dtype = mx.float32, layers: int = 2) -> LayerStorage:
    """``layers`` layers with a state in one KV group, with ten pages each."""
    described = [StateLayer(i, ((3, 6), (2, 4, 5)), (dtype, mx.float32)) for i in range(layers)]
    page = 3 * 6 * dtype.size + 2 * 4 * 5 * 4 + 64
    pools = {i: PagePool(10, page, dtype) for i in range(layers)}
    return LayerStorage(
        described, pools, dict.fromkeys(range(layers), 0), [BLOCK], keep_boundaries=True
    )


def states(rows: int, start: float, dtype: mx.Dtype = mx.float32, layers: int = 2) -> list[Any]:
    made = []
    for layer in range(layers):
        conv = mx.arange(rows * 18).reshape(rows, 3, 6) / 8 + start + layer
        made.append((conv.astype(dtype), mx.arange(rows * 40).reshape(rows, 2, 4, 5) - start))
    return [(conv, state.astype(mx.float32)) for conv, state in made]


def row(all_states: list[Any], index: int) -> list[list[Any]]:
    return [[part[index].tolist() for part in state] for state in all_states]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_saved_state_comes_back_bit_for_bit(dtype: mx.Dtype) -> None:
    pool = storage(dtype).states
    given = states(2, 3.0, dtype)
    pool.put_in(["a", "b"], given)
    pool.save(["b", "a"], {0: [7, 2]})
    pool.drop({"a", "b"})
    back = pool.take_out(["a", "b"], [5, 5], {0: [2, 7]})
    assert row(back, 0) == row(given, 0)
    assert row(back, 1) == row(given, 1)
    assert back[0][0].dtype == dtype


def test_who_has_computed_nothing_starts_from_zero_whatever_its_page_holds() -> None:
    pool = storage().states
    pool.put_in(["a"], states(1, 3.0))
    pool.save(["a"], {0: [4]})
    pool.drop({"a"})
    fresh = pool.take_out(["successor"], [0], {0: [4]})
    assert not any(part.any().item() for state in fresh for part in state)


def test_the_same_batch_gets_its_own_arrays_back() -> None:
    pool = storage().states
    given = states(2, 1.0)
    pool.put_in(["a", "b"], given)
    back = pool.take_out(["a", "b"], [1, 1], {0: [1, 2]})
    assert all(mine is yours for mine, yours in zip(given, back, strict=True))


def test_rows_are_gathered_from_banks_pages_and_zeros_in_the_order_requested() -> None:
    pool = storage().states
    first, second, paged = states(2, 1.0), states(1, 50.0), states(1, 90.0)
    pool.put_in(["p"], paged)
    pool.save(["p"], {0: [3]})
    pool.drop({"p"})
    pool.put_in(["a", "b"], first)
    pool.put_in(["c"], second)
    back = pool.take_out(["new", "c", "p", "a"], [0, 9, 6, 9], {0: [5, 6, 3, 7]})
    assert not any(part[0].any().item() for state in back for part in state)
    assert row(back, 1) == row(second, 0)
    assert row(back, 2) == row(paged, 0)
    assert row(back, 3) == row(first, 0)
    assert pool.resident == {"b"}
    assert row(pool.take_out(["b"], [9], {0: [1]}), 0) == row(first, 1)


@pytest.mark.parametrize("shapes", [((2, 6),), ((1, 3), (2, 2), (5,))], ids=str)
def test_a_state_has_as_many_arrays_as_the_layer_says(shapes: Any) -> None:
    layer = StateLayer(0, shapes, (mx.float32,) * len(shapes))
    pools = {0: PagePool(10, StatePool.bytes_per_sequence([layer]), mx.float32)}
    pool = LayerStorage([layer], pools, {0: 0}, [BLOCK], keep_boundaries=True).states
    given = tuple(mx.random.normal((2, *shape)) for shape in shapes)
    pool.put_in(["a", "b"], [given])
    pool.save(["a", "b"], {0: [3, 9]})
    pool.drop({"a", "b"})
    (back,) = pool.take_out(["new", "b", "a"], [0, 4, 4], {0: [1, 9, 3]})
    for mine, yours in zip(back, given, strict=True):
        assert mx.array_equal(mine[1], yours[1]).item()
        assert mx.array_equal(mine[2], yours[0]).item()
        assert not mine[0].any().item()


def runner_with(*requests: Request) -> ModelRunner:
    sampler = SimpleNamespace(rows=TokenRows(512, 512))
    runner = ModelRunner(nn.Module(), storage(), sampler)  # type: ignore[arg-type]
    for request in requests:
        runner.batch.requests[request.req_id] = request
    runner.storage.states.put_in([r.req_id for r in requests], states(len(requests), 2.0))
    return runner


def request(req_id: str, blocks: list[int], done: int) -> Request:
    made = Request(req_id, [1] * done, PARAMS, [blocks], done)
    made.done = done
    return made


def test_a_state_whose_page_was_given_away_is_dropped() -> None:
    runner = runner_with(request("running", [1, 2], 6), request("preempted", [3, 4], 6))
    newcomer = NewRequest("new", [1, 2], PARAMS, ([4],), 0)
    kept_states.drop_preempted(
        runner.storage,
        runner.batch,
        Schedule(frozenset(), (newcomer,), (), {"running": 1, "new": 2}, ()),
    )
    assert runner.storage.states.resident == {"running"}


def test_a_request_that_is_only_not_scheduled_keeps_its_state() -> None:
    runner = runner_with(request("running", [1, 2], 6), request("paused", [3, 4], 6))
    newcomer = NewRequest("new", [1, 2], PARAMS, ([5],), 0)
    kept_states.drop_preempted(
        runner.storage,
        runner.batch,
        Schedule(frozenset(), (newcomer,), (), {"running": 1, "new": 2}, ()),
    )
    assert runner.storage.states.resident == {"running", "paused"}
