"""Of the states after every token of a pass, the right one is kept or written."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from vllm_moe_compat.backend.pages.layers import StateLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.state_pool import StatePool
from vllm_moe_compat.backend.pages.states_by_position import StatesByPosition, Steps, Window

TAIL, STATE = (3, 6), (2, 4, 5)
TOKENS, ROWS = 4, 3


def layer(seed: int, dtype: mx.Dtype = mx.float32) -> tuple[StatesByPosition, Any]:
    """States of one layer by position, and the same as numpy: ``tail``, ``state [B, T, …]``."""
    draw = np.random.default_rng(seed)
    sequence = mx.array(draw.normal(size=(ROWS, TAIL[0] + TOKENS, TAIL[1]))).astype(dtype)
    states = mx.array(draw.normal(size=(TOKENS, ROWS, *STATE))).astype(mx.float32)
    recorded = StatesByPosition((Steps(tuple(states)), Window(sequence, TAIL[0])))
    plain = np.asarray(sequence.astype(mx.float32))
    tails = np.stack([plain[:, t : t + TAIL[0]] for t in range(1, TOKENS + 1)], axis=1)
    return recorded, (np.asarray(states).swapaxes(0, 1), tails)


def pool(layers: int, dtype: mx.Dtype) -> StatePool:
    described = [StateLayer(i, (STATE, TAIL), (mx.float32, dtype)) for i in range(layers)]
    page = 2 * 4 * 5 * 4 + 3 * 6 * dtype.size + 64
    return StatePool(described, [PagePool(10, page, dtype) for _ in described], [0] * layers)


@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 4, 4], [2, 4, 1], [3, 1, 3]])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_each_row_keeps_the_state_after_its_own_tokens(counts: list[int], dtype: mx.Dtype) -> None:
    states = pool(2, dtype)
    made = [layer(seed, dtype) for seed in range(2)]
    states.put_positions(["a", "b", "c"], [recorded for recorded, _ in made], counts)
    kept = states.resident_states(["a", "b", "c"])
    for (_, expected), state in zip(made, kept, strict=True):
        for all_of_them, part in zip(expected, state, strict=True):
            for row, count in enumerate(counts):
                found = np.asarray(part[row].astype(mx.float32))
                assert np.array_equal(found, all_of_them[row, count - 1])
        assert [part.dtype for part in state] == [mx.float32, dtype]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_states_inside_a_pass_are_written_to_pages(dtype: mx.Dtype) -> None:
    """Two boundaries of one row, one of another, and no change of resident states."""
    states = pool(2, dtype)
    made = [layer(seed, dtype) for seed in range(2)]
    by_position = [recorded for recorded, _ in made]
    states.put_positions(["a", "b", "c"], by_position, [4, 4, 4])
    resident = states.resident_states(["a", "b", "c"])
    states.save_positions(by_position, [2, 0, 2], [1, 2, 3], {0: [7, 4, 5]})
    assert states.resident_states(["a", "b", "c"]) is resident
    back = states.take_out(["x", "y", "z"], [1, 1, 1], {0: [7, 4, 5]})
    for (_, expected), state in zip(made, back, strict=True):
        for all_of_them, part in zip(expected, state, strict=True):
            for place, (row, count) in enumerate([(2, 1), (0, 2), (2, 3)]):
                found = np.asarray(part[place].astype(mx.float32))
                assert np.array_equal(found, all_of_them[row, count - 1])
    states.save_positions(by_position, [], [], {0: []})


def test_a_window_slides_along_any_axis() -> None:
    sequence = mx.random.normal((2, 3, 6, 5))
    recorded = StatesByPosition((Window(sequence, 1, axis=2),))
    assert recorded.parts[0].shape == (2, 3, 1, 5)
    assert recorded.parts[0].tokens == 5
    (found,) = recorded.after([0, 1], [5, 2])
    assert mx.array_equal(found[0], sequence[0, :, 5:6])
    assert mx.array_equal(found[1], sequence[1, :, 2:3])


@pytest.mark.parametrize("counts", [[0, 1, 1], [1, 5, 1], [1, 1]])
def test_states_that_a_pass_does_not_have_are_not_given(counts: list[int]) -> None:
    recorded, _ = layer(0)
    with pytest.raises(ValueError, match="of a pass of 4 tokens"):
        recorded.after([0, 1, 2], counts)


def test_the_states_of_other_tokens_are_freed() -> None:
    """A bank of gathered states holds its own bytes and nothing else."""
    size = 1 << 18
    steps = tuple(mx.full((2, size), token, dtype=mx.float32) for token in range(8))
    window = mx.zeros((2, 8 + 3, size // 4))
    mx.eval(steps, window)
    states = StatePool([], [], [])
    before = mx.get_active_memory()
    by_position = [StatesByPosition((Steps(steps), Window(window, 3)))]
    states.put_positions(["a", "b"], by_position, [3, 5])
    held = mx.get_active_memory() - before
    assert held == 2 * size * 4 + 2 * 3 * (size // 4) * 4
    del by_position, steps, window
    left = mx.get_active_memory() - before
    assert left == held - (8 * 2 * size + 2 * 11 * (size // 4)) * 4
