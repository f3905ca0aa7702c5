"""The operations of a plan on MLX arrays.

``run`` carries one out on whole tensors. ``floats`` is the way of large ones: it
yields a tensor a few experts, or a band of rows, at a time, dequantised where it has
a scale, so that no more than a few megabytes are ever held twice. A product
``q * scale`` is formed in float32 and rounded once to the target, so the result is
bit for bit that of dequantising every expert first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from vllm_moe_compat.execute import fp8_tables as lookup
from vllm_moe_compat.plan import ops as op_types
from vllm_moe_compat.plan.ops import Op
from vllm_moe_compat.plan.packing import Requantize, Unpack

TEMPORARY_BYTES = 16 * 2**20
"""How large the float32 intermediates of one dequantisation step may be."""

E4M3_MAX = 448.0
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


class Stack:
    """``E`` equal arrays seen as one ``[E, …]`` that is never built as a whole."""

    def __init__(self, parts: list[mx.array]) -> None:
        self._parts: list[Any] = list(parts)
        self.shape = (len(parts), *parts[0].shape)

    def all(self) -> mx.array:
        """Return the whole as an array and let go of the parts."""
        return self.take(0, self.shape[0])

    def pop(self, expert: int) -> mx.array:
        """Return one part and let go of it."""
        part, self._parts[expert] = self._parts[expert], None
        return cast("mx.array", part)

    def take(self, start: int, stop: int) -> mx.array:
        """Return ``[start:stop]`` as an array and let go of those parts."""
        chunk = mx.stack(self._parts[start:stop])
        self._parts[start:stop] = [None] * (stop - start)
        return chunk


@dataclass(slots=True)
class Arrays:
    """An ``Operand`` with its values."""

    weights: list[Any]
    scales: list[Any] = field(default_factory=list)
    biases: list[Any] = field(default_factory=list)


def run(op: Op, given: Arrays, dtype: str) -> Arrays:
    """Carry out one operation; ``dtype`` is what dequantising gives."""
    match op:
        case op_types.StackExperts():
            return Arrays([Stack(given.weights)], [mx.stack(given.scales)] if given.scales else [])
        case op_types.UnstackExperts(experts):
            return Arrays(*([t[e] for t in ts for e in range(experts)] for ts in _both(given)))
        case op_types.DequantizeFp8(block):
            (weight,), (scale,) = given.weights, given.scales
            return Arrays([dequantize(weight, scale, block, dtype)])
        case op_types.QuantizeFp8(block, e8m0):
            weight, scale = quantize(given.weights[0], block, e8m0=e8m0)
            return Arrays([weight], [scale])
        case Requantize(bits, group, mode):
            packed = [mx.quantize(w, group, bits, mode=mode) for w in given.weights]
            return Arrays(*([p[i] for p in packed if len(p) > i] for i in range(3)))
        case Unpack(bits, group, mode):
            biases = given.biases or [None] * len(given.weights)
            parts = zip(given.weights, given.scales, biases, strict=True)
            kind = DTYPES[dtype]
            return Arrays(
                [mx.dequantize(w, s, b, group, bits, mode=mode, dtype=kind) for w, s, b in parts]
            )
        case _:
            weights = [t.all() if isinstance(t, Stack) else t for t in given.weights]
            return Arrays(_reshape(op, weights, dtype))


def _reshape(op: Op, weights: list[mx.array], dtype: str) -> list[mx.array]:
    """Carry out what only moves values, or adds a number; results are copies, no views.

    A view would keep the tensor alive that it is a part of.
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
                else (
                    last[..., :half],
                    last[..., half:],
                )
            )
            return [mx.contiguous(h if axis == -1 else h.swapaxes(-1, -2)) for h in halves]
        case op_types.JoinGateUp(interleaved, axis):
            if not interleaved:
                return [mx.concatenate(weights, axis=axis)]
            axis += first.ndim
            shape = list(first.shape)
            shape[axis] *= 2
            return [mx.stack(weights, axis=axis + 1).reshape(shape)]
        case op_types.Add(number):
            kind = mx.float32 if dtype == "float32" else first.dtype
            return [(first.astype(mx.float32) + number).astype(kind)]
        case op_types.SplitRows(parts):
            return [mx.contiguous(part) for part in mx.split(first, parts)]
        case op_types.JoinRows():
            return [mx.concatenate(weights)]
        case op_types.SplitLatent(heads, keys):
            rows = first.reshape(heads, -1, first.shape[-1])
            embed = rows[:, :keys].swapaxes(-1, -2)
            return [mx.contiguous(embed), mx.contiguous(rows[:, keys:])]
        case op_types.JoinLatent():
            embed, unembed = weights
            rows = mx.concatenate([embed.swapaxes(-1, -2), unembed], axis=1)
            return [rows.reshape(-1, rows.shape[-1])]
    raise TypeError(f"{op} is no operation on values alone")


def _both(given: Arrays) -> tuple[list[Any], list[Any]]:
    return given.weights, given.scales


def dequantize(
    weight: mx.array | Stack, scale: mx.array, block: tuple[int, int], dtype: str
) -> mx.array:
    """Multiply E4M3 bytes by their scales, as a whole.

    Args:
        weight: ``[…, O, I]``, uint8.
        scale: as many as ``[…, ceil(O/b0), ceil(I/b1)]``, or one; any float, or E8M0 bytes.
        block: ``(b0, b1)``.
        dtype: of the result.

    Returns:
        ``[…, O, I]``.
    """
    *lead, rows, columns = weight.shape
    out = mx.zeros((math.prod(lead), rows, columns), dtype=DTYPES[dtype])
    for experts, band, part in floats(weight, scale, block, dtype):
        out[experts, band] = part
    return out.reshape(*lead, rows, columns)


def floats(
    weight: mx.array | Stack,
    scale: mx.array | None,
    block: tuple[int, int],
    dtype: str,
    *,
    whole: bool = False,
) -> Iterator[tuple[slice, slice, mx.array]]:
    """Yield the tensor a few experts, or a band of rows, at a time.

    Args:
        weight: ``[…, O, I]``, uint8 with a scale, any float without.
        scale: as ``dequantize`` takes it, or None where nothing is to be done.
        block: ``(b0, b1)``.
        dtype: what products become; a weight without scale keeps its own.
        whole: whether an expert is wanted with all of its rows.

    Yields:
        Which of the leading axes (flattened), which rows, and ``[n, o, I]``, not
        yet evaluated. Sources that are spent are let go of.
    """
    *lead, rows, columns = weight.shape
    count = math.prod(lead)
    if not isinstance(weight, Stack):
        weight = weight.reshape(count, rows, columns)
    if scale is not None:
        scale = factors(scale, (count, -(-rows // block[0]), -(-columns // block[1])))

    row_bytes = 4 * max(columns, 1)
    at_once = max(1, TEMPORARY_BYTES // max(rows * row_bytes, 1))
    band = rows
    if rows * row_bytes > TEMPORARY_BYTES and not whole:
        # One row of factors fits any band; more of them want whole blocks.
        step = 1 if block[0] >= rows else block[0]
        band = max(1, TEMPORARY_BYTES // row_bytes // step) * step
    for start in range(0, count, at_once):
        stop = min(start + at_once, count)
        chunk = weight.take(start, stop) if isinstance(weight, Stack) else weight[start:stop]
        for top in range(0, rows, max(band, 1)):
            bottom = min(top + band, rows)
            part = chunk[:, top:bottom]
            if scale is not None:
                here = scale[start:stop, top // block[0] : -(-bottom // block[0])]
                part = _product(part, here, (min(block[0], bottom - top), block[1]), dtype)
            yield slice(start, stop), slice(top, bottom), part
            del part


def factors(scale: mx.array, grid: tuple[int, ...]) -> mx.array:
    """Return scales as float32 ``grid``; a byte ``b`` is E8M0 and worth ``2 ** (b - 127)``."""
    scale = mx.broadcast_to(scale.flatten(), grid) if scale.size == 1 else scale.reshape(grid)
    if scale.dtype != mx.uint8:
        return scale.astype(mx.float32)
    bits = scale.astype(mx.uint32)
    # As the exponent of a float32; byte 0 is the one power of two below its normals.
    exponent = mx.where(bits == 0, mx.array(1 << 22, mx.uint32), bits << 23)
    return mx.where(bits == 255, float("nan"), exponent.view(mx.float32))


def multiplied_in(dtype: str) -> lookup.Multiply:
    """Return what forms products of bytes and scales in float32 and rounds them to ``dtype``."""
    return lambda q, s: (mx.from_fp8(q, dtype=mx.float32) * s).astype(DTYPES[dtype])


def _product(weight: mx.array, scale: mx.array, block: tuple[int, int], dtype: str) -> mx.array:
    """Return ``[N, O, I]`` times ``[N, o, i]``, formed in float32, rounded once."""
    count, rows, columns = weight.shape
    if lookup.pays(rows, columns, block):
        return lookup.product(weight, scale, block, multiplied_in(dtype), DTYPES[dtype])
    exact = mx.from_fp8(weight, dtype=mx.float32)
    if rows % block[0] or columns % block[1]:
        scale = mx.repeat(scale, block[1], axis=2)[:, :, :columns]
        product = exact * mx.repeat(scale, block[0], axis=1)[:, :rows]
    else:
        tiles = exact.reshape(count, rows // block[0], block[0], columns // block[1], block[1])
        product = (tiles * scale[:, :, None, :, None]).reshape(count, rows, columns)
    return product.astype(DTYPES[dtype])


def quantize(
    weight: mx.array, block: tuple[int, int], *, e8m0: bool = False
) -> tuple[mx.array, mx.array]:
    """Return E4M3 bytes ``[…, O, I]`` and scales ``[…, o, i]``, float32 or E8M0 bytes.

    The inverse of ``dequantize``, up to E4M3's rounding. Experts go a few at a time.
    """
    *lead, rows, columns = weight.shape
    count = math.prod(lead)
    at_once = max(1, TEMPORARY_BYTES // max(4 * rows * columns, 1))
    if count <= at_once:
        return _quantize(weight, block, e8m0=e8m0)
    flat = weight.reshape(count, rows, columns)
    grid = (count, -(-rows // block[0]), -(-columns // block[1]))
    packed = mx.zeros(flat.shape, dtype=mx.uint8)
    scales = mx.zeros(grid, dtype=mx.uint8 if e8m0 else mx.float32)
    for start in range(0, count, at_once):
        place = slice(start, start + at_once)
        packed[place], scales[place] = _quantize(flat[place], block, e8m0=e8m0)
        mx.eval(packed, scales)
    return packed.reshape(weight.shape), scales.reshape(*lead, *grid[1:])


def _quantize(weight: mx.array, block: tuple[int, int], *, e8m0: bool) -> tuple[mx.array, mx.array]:
    *lead, rows, columns = weight.shape
    padded = mx.pad(
        weight.astype(mx.float32),
        [(0, 0)] * len(lead) + [(0, -rows % block[0]), (0, -columns % block[1])],
    )
    grid = (padded.shape[-2] // block[0], padded.shape[-1] // block[1])
    tiles = padded.reshape(*lead, grid[0], block[0], grid[1], block[1])
    largest = mx.abs(tiles).max(axis=(-3, -1))
    scale = mx.where(largest == 0, 1.0, largest / E4M3_MAX)
    if e8m0:
        exponent = mx.clip(mx.ceil(mx.log2(scale)) + 127, 1, 254).astype(mx.uint8)
        scale = factors(exponent, exponent.shape)
    quotient = mx.clip(tiles / scale[..., :, None, :, None], -E4M3_MAX, E4M3_MAX)
    packed = mx.to_fp8(quotient).reshape(padded.shape)
    return packed[..., :rows, :columns], exponent if e8m0 else scale
