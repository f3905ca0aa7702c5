"""Run the operations of a plan on MLX arrays.

``run`` runs an operation on whole tensors. ``bands`` is for large tensors: it yields a few
experts, or a band of rows, at a time, dequantised if they are in a stored number form, so at
most a few megabytes are held twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.operations import Dequantize, Op
from vllm_moe_compat.dtypes import mlx_dtype
from vllm_moe_compat.execute import stack
from vllm_moe_compat.execute.numbers import executor_of
from vllm_moe_compat.execute.numbers.executor import Parts
from vllm_moe_compat.execute.stack import Arrays, Stack, as_whole
from vllm_moe_compat.execute.stored_tensors import as_array
from vllm_moe_compat.plan import ops as op_types
from vllm_moe_compat.plan.packing import Requantize

Band = tuple[slice, slice, list[mx.array]]
"""Slice of the flattened leading axes, slice of the rows, and the arrays ``[n, o, …]``: the
floats, or words with their scales."""


def run(op: Op, given: Arrays, dtype: str) -> Arrays:
    """Run one operation; dequantised weights get ``dtype``."""
    match op:
        case op_types.StackExperts():
            parts = {role: [mx.stack(arrays)] for role, arrays in given.parts.items()}
            return Arrays([Stack(given.weights)], parts)
        case op_types.UnstackExperts(experts):
            apart = {
                role: [array[e] for array in arrays for e in range(experts)]
                for role, arrays in given.parts.items()
            }
            weights = [as_array(w) for w in given.weights]
            return Arrays([w[e] for w in weights for e in range(experts)], apart)
        case Dequantize():
            return Arrays([dequantize(given.weights[0], op, given.only(), dtype)])
        case Requantize(bits, group, mode):
            packed = [mx.quantize(as_whole(w), group, bits, mode=mode) for w in given.weights]
            roles = ("scales", "biases")[: len(packed[0]) - 1]
            parts = {role: [p[n] for p in packed] for n, role in enumerate(roles, start=1)}
            return Arrays([p[0] for p in packed], parts)
    whole = Arrays([as_whole(w) for w in given.weights], given.parts)
    moved = _moved(op, whole.weights, dtype)
    return executor_of(op).quantize(op, whole) if moved is None else Arrays(moved)


def _moved(op: Op, weights: list[mx.array], dtype: str) -> list[mx.array] | None:
    """Run an operation that moves values or adds a number; return None for any other.

    Results are copies, since a view would keep its parent tensor alive.
    """
    first = weights[0]
    match op:
        case op_types.Transpose():
            return [mx.contiguous(w.swapaxes(-1, -2)) for w in weights]
        case op_types.SplitGateUp(interleaved, axis):
            last = first if axis == -1 else first.swapaxes(-1, -2)
            half = last.shape[-1] // 2
            halves = (
                (last[..., ::2], last[..., 1::2])
                if interleaved
                else (last[..., :half], last[..., half:])
            )
            return [mx.contiguous(h if axis == -1 else h.swapaxes(-1, -2)) for h in halves]
        case op_types.JoinGateUp(interleaved, axis):
            if not interleaved:
                return [mx.concatenate(weights, axis=axis)]
            axis += first.ndim
            shape = list(first.shape)
            shape[axis] *= 2
            return [mx.stack(weights, axis=axis + 1).reshape(shape)]
        case op_types.AsWords(grouped):
            octets = mx.flatten(first, -2) if grouped else first
            return [mx.contiguous(octets).view(mx.uint32)]
        case op_types.Add(number):
            kind = mx.float32 if dtype == "float32" else first.dtype
            return [(first.astype(mx.float32) + number).astype(kind)]
        case op_types.SplitRows(parts):
            return [mx.contiguous(part) for part in mx.split(first, parts)]
        case op_types.SplitLatent(heads, keys):
            rows = first.reshape(heads, -1, first.shape[-1])
            embed = rows[:, :keys].swapaxes(-1, -2)
            return [mx.contiguous(embed), mx.contiguous(rows[:, keys:])]
    return None


def dequantize(weight: mx.array | Stack, op: Dequantize, parts: Parts, dtype: str) -> mx.array:
    """Return a whole stored weight ``[…, O, I]`` as floats.

    Args:
        weight: the tensor with the stored numbers.
        op: the dequantising operation of its form.
        parts: role → further tensor of the form.
        dtype: dtype of the result.
    """
    *lead, rows, columns = op.logical(tuple(weight.shape))
    out = mx.zeros((math.prod(lead), rows, columns), dtype=mlx_dtype(dtype))
    for experts, band, (part,) in bands(weight, op, ready(weight, op, parts), dtype):
        out[experts, band] = part
    return out.reshape(*lead, rows, columns)


def bands(
    weight: Any,
    op: Dequantize | None,
    parts: Parts,
    dtype: str,
    *,
    whole: bool = False,
    held: bool = False,
    pending: Callable[[], Sequence[mx.array]] = tuple,
) -> Iterator[Band]:
    """Yield a tensor ``[…, O, I]`` a few experts, or a band of rows, at a time.

    Args:
        weight: an array, a ``StoredTensor``, or a ``Stack``, whose members are released as they
            are used.
        op: the dequantising operation; None for floats, which stay as they are.
        parts: role → further tensor of the form; with an operation, the result of ``ready``.
        dtype: dtype of dequantised weights.
        whole: whether a band must hold all rows of its experts.
        held: whether bands are in the packed format ``op.held`` instead of floats.
        pending: returns unevaluated arrays that the next members of a ``Stack`` wait for.

    Yields:
        Bands; lazy.
    """
    stored = tuple(weight.shape)
    *lead, rows, columns = stored if op is None else op.logical(stored)
    count = math.prod(lead)
    if not isinstance(weight, Stack):
        weight = weight.reshape(count, *stored[-2:])
    executor = None if op is None else executor_of(op)

    row_bytes = 4 * max(columns, 1)
    at_once = max(1, stack.TEMPORARY_BYTES // max(rows * row_bytes, 1))
    height = rows
    if rows * row_bytes > stack.TEMPORARY_BYTES and not whole:
        # Bands hold whole blocks, unless one block has all rows.
        block = 1 if op is None or op.rows_per_part >= rows else op.rows_per_part
        height = max(1, stack.TEMPORARY_BYTES // row_bytes // block) * block
    for start in range(0, count, at_once):
        experts = slice(start, min(start + at_once, count))
        if isinstance(weight, Stack):
            chunk = weight.take(start, experts.stop, pending())
        else:
            chunk = as_array(weight[experts])
        for top in range(0, rows, max(height, 1)):
            band = slice(top, min(top + height, rows))
            part = chunk[:, band] if executor is None else executor.cut(op, chunk, band)
            if executor is None:
                arrays = [part]
            elif held:
                arrays = list(executor.packed(op, part, parts, experts, band))
            else:
                arrays = [executor.floats(op, part, parts, experts, band, dtype)]
            del part
            yield experts, band, arrays
            arrays.clear()


def ready(weight: Any, op: Dequantize, parts: Parts) -> Parts:
    """Return the parts of a stored tensor ``[…, …, …]`` as ``bands`` takes them."""
    *lead, height, width = weight.shape
    return executor_of(op).ready(op, parts, (math.prod(lead), height, width))
