"""Packed integers on MLX arrays: as floats, or as the words that MLX computes with.

All storages are brought into MLX's order of words, ``[n, O, I·b/32]`` with the lowest bits first,
a band of rows at a time. GPTQ's words need a transposition, since they are a stream of bits
along ``I`` as MLX's are, int8 a flip of the highest bit, AWQ's nibbles an exchange. Nothing is
rounded: biases ``-zero·scale`` are computed in float32.

Axes: ``N`` experts, ``O`` output rows, ``I`` input columns, ``G`` groups of columns, ``b`` bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from vllm_moe_compat.checkpoint.findings import AGAIN
from vllm_moe_compat.checkpoint.numbers.ints_op import (
    AWQ_WORDS,
    BYTES,
    COLUMN_WORDS,
    ORDER,
    ROW_WORDS,
    SCALE,
    SHAPE,
    ZERO,
    DequantizeInts,
)
from vllm_moe_compat.checkpoint.operations import Dequantize, Op
from vllm_moe_compat.dtypes import mlx_dtype
from vllm_moe_compat.errors import LayoutError
from vllm_moe_compat.execute import fp8_pairs
from vllm_moe_compat.execute.fp8_tables import Bits
from vllm_moe_compat.execute.numbers import awq_words
from vllm_moe_compat.execute.numbers.executor import Executor, HeldPart, Parts
from vllm_moe_compat.execute.stack import Arrays
from vllm_moe_compat.execute.stored_tensors import Source, StoredTensor
from vllm_moe_compat.plan.build import Restriction


class IntExecutor(Executor):
    """Runs ``DequantizeInts``."""

    def ready(self, op: DequantizeInts, parts: Parts, shape: tuple[int, int, int]) -> Parts:
        """Return scales and zero points ``[N, O, G]`` and the columns' groups ``[N, I]``.

        Raises:
            LayoutError: ``weight_shape``, ``g_idx`` or the zero points contradict the operation.
        """
        count, rows, columns = op.logical(shape)
        stored = parts[SCALE]
        groups = op.groups
        if stored.size != count * rows * groups:
            scale = mx.broadcast_to(stored.reshape(-1, 1, 1), (count, rows, groups))
        elif op.storage in (ROW_WORDS, BYTES):
            scale = stored.reshape(count, rows, groups)
        else:
            scale = stored.reshape(count, groups, rows).swapaxes(1, 2)
        found = {SCALE: scale}
        if ZERO in parts:
            zero = _zeros(op, parts[ZERO], count, rows)
            if op.symmetric and mx.any(zero != 2 ** (op.bits - 1)).item():
                raise _contradiction(
                    "zero points other than the middle",
                    "the middle was expected, as config.json says that the weights are symmetric",
                )
            found[ZERO] = zero
        if ORDER in parts:
            order = mx.broadcast_to(parts[ORDER].reshape(-1, columns), (count, columns))
            _check_order(op, order)
            if op.act_order:
                found[ORDER] = order
        if SHAPE in parts:
            sizes = parts[SHAPE]
            each = sizes.reshape(-1, sizes.shape[-1])[:, -2:]
            wrong = mx.any(each != mx.array([rows, columns]), axis=-1)
            if mx.any(wrong).item():
                named = each[mx.argmax(wrong).item()].tolist()
                raise _contradiction(
                    f"a weight_shape of {named}", f"{[rows, columns]} was expected, as packed"
                )
        return found

    def cut(self, op: DequantizeInts, weight: mx.array, rows: slice) -> mx.array:
        """Return the rows of stored integers, which may be in the last axis."""
        match op.storage:
            case "column words":
                return weight[:, :, rows]
            case "AWQ words":
                return weight[:, :, rows.start // 8 : -(-rows.stop // 8)]
        return weight[:, rows]

    def floats(
        self,
        op: DequantizeInts,
        weight: mx.array,
        parts: Parts,
        experts: slice,
        rows: slice,
        dtype: str,
    ) -> mx.array:
        """Return ``(q - zero)·scale`` of a band."""
        values = _values(op, weight).astype(mx.float32)
        scale = parts[SCALE][experts, rows].astype(mx.float32)
        zero = parts[ZERO][experts, rows] if ZERO in parts else None
        if zero is None:
            values -= 2.0 ** (op.bits - 1)
        wide = _widener(op, parts, experts, rows)
        if zero is not None:
            values -= wide(zero.astype(mx.float32))
        return (values * wide(scale)).astype(mlx_dtype(dtype))

    def packed(
        self, op: DequantizeInts, weight: mx.array, parts: Parts, experts: slice, rows: slice
    ) -> tuple[mx.array, ...]:
        """Return words, scales and biases of a band."""
        held = op.held
        assert held is not None, "the plan holds no other weight"
        exact = parts[SCALE][experts, rows].astype(mx.float32)
        zero = parts[ZERO][experts, rows].astype(mx.float32) if ZERO in parts else None
        bias = exact * -(2.0 ** (op.bits - 1)) if zero is None else -zero * exact
        dtype = mlx_dtype(held.scales)
        scale, bias = exact.astype(dtype), bias.astype(dtype)
        if held.group != op.group:
            starts = mx.arange(0, op.columns, held.group) // op.group
            scale, bias = mx.take(scale, starts, axis=-1), mx.take(bias, starts, axis=-1)
        return _words(op, weight), scale, bias

    def region(self, op: DequantizeInts, weight: Source, region: Restriction) -> Source:
        """Return the region's experts and rows; all columns stay."""
        if region.experts is not None:
            weight = weight[slice(*region.experts)]
        if region.rows is None:
            return weight
        first, last = region.rows
        match op.storage:
            case "column words":
                return weight[..., first:last]
            case "AWQ words":
                return weight[..., first // 8 : -(-last // 8)]
        return weight[..., first:last, :]

    def restrict(
        self,
        op: Dequantize,
        parts: Mapping[str, Source],
        shape: tuple[int, ...],
        region: Restriction,
    ) -> dict[str, Source]:
        """Return the region's parts; ``weight_shape`` is that of the whole weight."""
        assert isinstance(op, DequantizeInts)
        found = {role: part for role, part in parts.items() if role != SHAPE}
        lead = len(shape) - 2
        for role, part in found.items():
            if region.experts is not None and lead and part.ndim > lead:
                part = part[slice(*region.experts)]
            if region.rows is not None and role in (SCALE, ZERO) and part.size > 1:
                first, last = region.rows
                words = role == ZERO and op.storage != BYTES
                if words:
                    first, last = first * op.bits // 32, -(-last * op.bits // 32)
                if op.storage in (COLUMN_WORDS, AWQ_WORDS) or part.ndim == lead + 1:
                    part = part[..., first:last]
                else:
                    part = part[..., first:last, :]
            found[role] = part
        return found

    def holds_bytes(self, op: DequantizeInts, roles: Collection[str]) -> bool:
        """Whether words lie along the rows, with the scales that MLX takes and no zero points."""
        held = op.held
        alike = held is not None and held.group == op.group and held.scales == op.scales
        return op.storage == ROW_WORDS and alike and {SCALE} <= {*roles} <= {SCALE, SHAPE}

    def held_parts(self, op: DequantizeInts, operand: Arrays) -> list[HeldPart]:
        """Return words and scales, of which the biases are made."""
        parts: dict[str, Any] = operand.only()
        words, scale = operand.weights[0], parts[SCALE]
        found = [HeldPart("weight", words), HeldPart("scales", scale)]
        found.append(HeldPart("biases", scale, partial(_biases, op, scale.kind)))
        if SHAPE in parts:
            size = op.logical(words.shape)[-2:]
            found.append(HeldPart("", parts[SHAPE], partial(_check_shape, parts[SHAPE], size)))
        return found

    def quantize(self, op: Op, given: Arrays) -> Arrays:
        """No operation writes packed integers."""
        raise TypeError(f"{type(op).__name__} is no quantising operation")


EXECUTORS: dict[type[Op], Executor] = {DequantizeInts: IntExecutor()}


def _zeros(op: DequantizeInts, stored: mx.array, count: int, rows: int) -> mx.array:
    """Return zero points as integers ``[N, O, G]``, on the scale of the words."""
    groups = op.groups
    match op.storage:
        case "bytes":
            if stored.size != count * rows * groups:
                stored = mx.broadcast_to(stored.reshape(-1, 1, 1), (count, rows, groups))
            return stored.reshape(count, rows, groups).astype(mx.int32) + 128
        case "row words":
            words = stored.view(mx.uint32).reshape(count, -1, groups).swapaxes(1, 2)
            return unpack(words, op.bits)[..., :rows].swapaxes(1, 2).astype(mx.int32)
        case "AWQ words":
            words = stored.view(mx.uint32).reshape(count, groups, -1)
            return _awq_values(words).swapaxes(1, 2).astype(mx.int32)
    words = stored.view(mx.uint32).reshape(count, groups, -1)
    zero = unpack(words, op.bits)
    if op.minus_one:
        zero = (zero + 1) & (2**op.bits - 1)
    return zero.swapaxes(1, 2).astype(mx.int32)


def _biases(op: DequantizeInts, kind: str, stored: Bits) -> Bits:
    """Return ``-2^(b-1)`` times the scales, in their dtype, in which that is exact."""
    with np.errstate(over="ignore"):
        biases = fp8_pairs.scales(stored, kind) * np.float32(-(2.0 ** (op.bits - 1)))
        if kind == "F32":
            return biases
        if kind == "F16":
            return biases.astype(np.float16)
    found: Bits = (biases.view(np.uint32) >> 16).astype(np.uint16)
    return found


def _check_shape(tensor: StoredTensor, size: tuple[int, ...], stored: Bits) -> Bits:
    """Check ``weight_shape``; return nothing.

    Raises:
        LayoutError: it contradicts the words.
    """
    found = stored.view(f"i{tensor.dtype.size}")[-2:].tolist()
    if found != [*size]:
        raise LayoutError(
            f"{tensor.file.path.name}: {tensor.name} is {found}, where {[*size]} was expected, as "
            f"packed; {AGAIN}."
        )
    return stored[:0]


def _check_order(op: DequantizeInts, order: mx.array) -> None:
    """Check the groups of columns.

    Raises:
        LayoutError: a group does not exist, or columns are in act order and should not be.
    """
    if not op.act_order:
        if mx.any(order != mx.arange(op.columns) // op.group).item():
            raise _contradiction(
                "a g_idx in act order", "consecutive groups were expected, as config.json says"
            )
    elif mx.any(order < 0).item() or mx.any(order >= op.groups).item():
        raise _contradiction(
            "a g_idx beyond the scales", f"one of {op.groups:,} groups was expected"
        )


def _contradiction(found: str, expected: str) -> LayoutError:
    return LayoutError(f"it has {found}, where {expected}; {AGAIN}.")


def _widener(
    op: DequantizeInts, parts: Parts, experts: slice, rows: slice
) -> Callable[[mx.array], mx.array]:
    """Return a function from ``[n, o, G]`` to the columns ``[n, o, I]``, or what broadcasts."""
    if op.groups == 1:
        return lambda part: part
    if ORDER in parts:
        order = parts[ORDER][experts][:, None, :].astype(mx.int32)
        return lambda part: mx.take_along_axis(
            part, mx.broadcast_to(order, (*part.shape[:2], op.columns)), axis=-1
        )
    return lambda part: mx.repeat(part, op.group, axis=-1)[..., : op.columns]


def _values(op: DequantizeInts, weight: mx.array) -> mx.array:
    """Return the unsigned integers ``[n, o, I]`` of a band."""
    match op.storage:
        case "bytes":
            return weight.astype(mx.int32) + 128
        case "AWQ words":
            return _awq_values(weight.view(mx.uint32)).swapaxes(1, 2)
        case "column words":
            return unpack(weight.view(mx.uint32).swapaxes(1, 2), op.bits)
    return unpack(weight.view(mx.uint32), op.bits)[..., : op.columns]


def _words(op: DequantizeInts, weight: mx.array) -> mx.array:
    """Return a band in MLX's words ``[n, o, I·b/32]``."""
    match op.storage:
        case "bytes":
            return mx.contiguous(weight).view(mx.uint32) ^ 0x80808080
        case "AWQ words":
            return awq_words.in_mlx_order(weight.view(mx.uint32))
        case "column words":
            return mx.contiguous(weight.view(mx.uint32).swapaxes(1, 2))
    return mx.contiguous(weight).view(mx.uint32)


def unpack(words: mx.array, bits: int) -> mx.array:
    """Return the integers of a stream of bits: ``uint32 [..., W]`` gives ``[..., 32·W/bits]``."""
    mask = 2**bits - 1
    if 32 % bits == 0:
        shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
        spread: mx.array = (words[..., None] >> shifts) & mask
        return spread.reshape(*words.shape[:-1], -1)
    # 32 integers fill ``bits`` words; some lie across two of them.
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    places = [divmod(bits * number, 32) for number in range(32)]
    first = mx.array([word for word, _ in places])
    shift = mx.array([start for _, start in places], dtype=mx.uint32)
    after = mx.array([min(word + 1, bits - 1) for word, _ in places])
    crosses = mx.array([start + bits > 32 for _, start in places])
    low = mx.take(blocks, first, axis=-1) >> shift
    high = mx.take(blocks, after, axis=-1) << mx.where(crosses, 32 - shift, 0)
    found: mx.array = mx.where(crosses, low | high, low) & mask
    return found.reshape(*words.shape[:-1], -1)


def _awq_values(words: mx.array) -> mx.array:
    """Return the integers of AWQ's words: ``[..., W]`` gives ``[..., 8·W]``."""
    shifts = mx.array([4 * nibble for nibble in awq_words.NIBBLES], dtype=mx.uint32)
    spread: mx.array = (words[..., None] >> shifts) & 15
    return spread.reshape(*words.shape[:-1], -1)
