"""Every invertible operation, undone by its inverse: values and specs."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_compat.checkpoint.numbers import fp8_ops as f
from vllm_moe_compat.checkpoint.operations import Invertible, Operand, Spec
from vllm_moe_compat.execute import stack
from vllm_moe_compat.execute.arrays import run
from vllm_moe_compat.execute.numbers import fp8
from vllm_moe_compat.execute.stack import Arrays, Stack
from vllm_moe_compat.plan import ops as o

NAMES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.uint8: "U8", mx.uint32: "U32"}
SIZE = st.integers(1, 5)
SEED = st.integers(0, 2**16)


def values(shape: tuple[int, ...], seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    rng = np.random.default_rng(seed)
    if dtype == mx.uint8:
        return mx.array(rng.integers(0, 127, shape, dtype=np.uint8))
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def whole(given: Arrays) -> Arrays:
    return Arrays([w.all() if isinstance(w, Stack) else w for w in given.weights], given.parts)


def copied(given: Arrays) -> Arrays:
    return Arrays(list(given.weights), {role: list(each) for role, each in given.parts.items()})


def specs(found: Arrays, fp8: bool = False) -> Operand:
    def of(array: mx.array, name: str = "") -> Spec:
        return Spec(name or NAMES[array.dtype], tuple(array.shape))

    e4m3 = "F8_E4M3" if fp8 else ""
    weights = tuple(of(array, e4m3) for array in found.weights)
    return Operand(weights, {role: tuple(map(of, each)) for role, each in found.parts.items()})


def same(found: Arrays, wanted: Arrays) -> bool:
    if found.parts.keys() != wanted.parts.keys():
        return False
    pairs = [(found.weights, wanted.weights)]
    pairs += [(found.parts[role], wanted.parts[role]) for role in wanted.parts]
    return all(
        len(a) == len(b)
        and all(
            x.dtype == y.dtype and x.shape == y.shape and mx.array_equal(x, y).item()
            for x, y in zip(a, b, strict=True)
        )
        for a, b in pairs
    )


def undone(op: Any, given: Arrays) -> bool:
    """Whether the inverse gives the very values back, and both tell the specs before."""
    before = specs(given)
    made = whole(run(op, copied(given), "float32"))
    assert op.result(before, "F32") == specs(made)
    assert op.inverse().result(specs(made), "F32") == before
    assert op.inverse().inverse() == op
    return same(whole(run(op.inverse(), made, "float32")), given)


DTYPES = st.sampled_from([mx.float32, mx.bfloat16, mx.uint8])
SHAPES = st.lists(SIZE, min_size=2, max_size=3).map(tuple)


@settings(max_examples=25, deadline=None)
@given(count=SIZE, shape=SHAPES, scaled=st.booleans(), dtype=DTYPES, seed=SEED)
def test_stacking(count, shape, scaled, dtype, seed):
    scales = {"scale": [values((1, 1), seed + e) for e in range(count)]} if scaled else {}
    given = Arrays([values(shape, seed + e, dtype) for e in range(count)], scales)
    assert undone(o.StackExperts(count), given)
    stacked = whole(run(o.StackExperts(count), copied(given), "float32"))
    assert undone(o.UnstackExperts(count), stacked)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, dtype=DTYPES, seed=SEED)
def test_transposing(shape, dtype, seed):
    assert undone(o.Transpose(), Arrays([values(shape, seed, dtype)]))


@settings(max_examples=40, deadline=None)
@given(
    experts=SIZE,
    half=SIZE,
    width=SIZE,
    interleaved=st.booleans(),
    bias=st.booleans(),
    dtype=DTYPES,
    seed=SEED,
)
def test_splitting_gate_and_up(experts, half, width, interleaved, bias, dtype, seed):
    shape = (experts, 2 * half) if bias else (experts, 2 * half, width)
    op = o.SplitGateUp(interleaved, -1 if bias else -2)
    given = Arrays([values(shape, seed, dtype)])
    assert undone(op, given)
    assert undone(op.inverse(), run(op, given, "float32"))


@settings(max_examples=25, deadline=None)
@given(size=SIZE, steps=st.integers(-64, 64), number=st.sampled_from([1.0, -1.0, 0.5]))
def test_adding(size, steps, number):
    assert undone(o.Add(number), Arrays([mx.full((size,), steps / 64)]))


BLOCKS = st.sampled_from([(128, 128), (16, 32), (1, 40), (3, 5)])


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=1),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=BLOCKS,
    e8m0=st.booleans(),
    budget=st.sampled_from([1, 2**24]),
    power=st.integers(-20, 20),
    seed=SEED,
)
def test_quantising_to_fp8_is_idempotent(lead, rows, columns, block, e8m0, budget, power, seed):
    op = f.QuantizeFp8(block, e8m0)
    given = Arrays([values((*lead, rows, columns), seed) * 2.0**power])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "TEMPORARY_BYTES", budget)
        packed = run(op, given, "float32")
        exact = run(op.inverse(), packed, "float32")
        again = run(op.inverse(), run(op, exact, "float32"), "float32")
    before, made = specs(given), specs(packed, fp8=True)
    result = op.result(before, "F32")
    assert (result.weights, [s.shape for s in result.parts["scale"]]) == (
        made.weights,
        [s.shape for s in made.parts["scale"]],
    )
    assert op.inverse().result(result, "F32") == before
    assert op.inverse().inverse() == op
    # A power of two divides without rounding; any other scale does but for the last bit.
    wanted, found = exact.weights[0], again.weights[0]
    assert mx.array_equal(found, wanted) if e8m0 else mx.allclose(found, wanted, rtol=1e-6, atol=0)
    # Half a step of E4M3's four bits, at the coarsest end of a block.
    largest = mx.abs(given.weights[0]).max().item()
    assert mx.abs(wanted - given.weights[0]).max().item() <= largest / 16


def test_quantising_a_few_experts_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    weight = values((2, 3, 7, 9))
    for e8m0 in (False, True):
        monkeypatch.setattr(stack, "TEMPORARY_BYTES", 2**24)
        once = fp8.quantize(weight, (4, 4), e8m0=e8m0)
        monkeypatch.setattr(stack, "TEMPORARY_BYTES", 4 * 7 * 9 * 4)
        apart = fp8.quantize(weight, (4, 4), e8m0=e8m0)
        assert same(Arrays(list(apart)), Arrays(list(once)))


def test_no_invertible_operation_is_left_out():
    tested = {
        *(o.StackExperts, o.UnstackExperts, o.Transpose, o.SplitGateUp, o.JoinGateUp, o.Add),
        *(f.DequantizeFp8, f.QuantizeFp8),
    }
    defined = {
        op for op in Invertible.__subclasses__() if op.__module__.startswith("vllm_moe_compat.")
    }
    # A dataclass with slots replaces its class; Python 3.11 keeps the replaced one alive.
    live = {op for op in defined if getattr(sys.modules[op.__module__], op.__name__) is op}
    assert tested == live
