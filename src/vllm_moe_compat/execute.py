"""The only place where a plan meets MLX.

In goes the very dict that mlx-lm's loader holds, still unread from disk for the
most part; sources are taken *out* of it as they are consumed, since that dict is
what keeps them in memory. Each target is evaluated on its own, a few experts at
a time, so the peak is the final size plus a fraction of one layer.

A product ``q * scale`` is formed in float32 and rounded once to the target, so
the result is bit for bit that of dequantising every expert first.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from vllm_moe_compat.context import serving_dtype
from vllm_moe_compat.envs import DTYPE
from vllm_moe_compat.layout import TensorInfo
from vllm_moe_compat.plan import (
    Build,
    DequantizeBlockFp8,
    Op,
    Plan,
    QuantizeBlockFp8,
    StackExperts,
    UnstackExperts,
)

TEMPORARY_BYTES = 16 * 2**20
"""How large the float32 intermediates of one dequantisation step may be."""

E4M3_MAX = 448.0

_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
    mx.complex64: "C64",
}


def describe(weights: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Describe arrays as their headers would, reading nothing; FP8 shows as ``U8``."""
    return {
        name: TensorInfo(_NAMES.get(array.dtype, str(array.dtype)), tuple(array.shape))
        for name, array in weights.items()
    }


def target_dtype() -> str:
    """Return what FP8 weights become: the setting, else what serves, else the device's.

    MLX's CPU device gathers experts in float32 only.
    """
    chosen = DTYPE.read()
    if chosen != "auto":
        return chosen
    if serving := serving_dtype.get():
        return serving
    return "float32" if mx.default_device() == mx.Device(mx.cpu) else "bfloat16"


def execute(plan: Plan, weights: MutableMapping[str, mx.array], dtype: str) -> None:
    """Carry out the plan on ``weights``, in place.

    Args:
        plan: made for exactly these tensors.
        weights: the loader's dict; sources go, targets come.
        dtype: ``bfloat16``, ``float16`` or ``float32`` for what is dequantised.
            ``float32`` also widens what ``sanitize`` computes with.
    """
    if dtype == "float32":
        for name in plan.widen:
            weights[name] = weights[name].astype(mx.float32)
    for name in plan.drops:
        weights.pop(name, None)
    layer = ""
    for build in plan.builds:
        if build.layer != layer:
            mx.clear_cache()
            layer = build.layer
        target = _make(build, weights, dtype)
        mx.eval(target)
        weights[build.target] = target
    if plan.builds:
        mx.clear_cache()


def _make(build: Build, weights: MutableMapping[str, mx.array], dtype: str) -> mx.array:
    operand = Arrays(
        [weights.pop(name) for name in build.weights],
        [weights.pop(name) for name in build.scales],
    )
    for op in build.ops:
        operand = run(op, operand, dtype)
    (target,) = operand.weights
    return target.take(0, target.shape[0]) if isinstance(target, Stack) else target


class Stack:
    """``E`` equal arrays seen as one ``[E, …]`` that is never built as a whole."""

    def __init__(self, parts: list[mx.array]) -> None:
        self._parts: list[Any] = list(parts)
        self.shape = (len(parts), *parts[0].shape)

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


def run(op: Op, given: Arrays, dtype: str) -> Arrays:
    """Carry out one operation; ``dtype`` is what dequantising gives."""
    match op:
        case StackExperts():
            return Arrays([Stack(given.weights)], [mx.stack(given.scales)] if given.scales else [])
        case UnstackExperts(experts):
            return Arrays(*([t[e] for t in ts for e in range(experts)] for ts in _both(given)))
        case DequantizeBlockFp8(block):
            (weight,), (scale,) = given.weights, given.scales
            return Arrays([dequantize(weight, scale, block, dtype)])
        case QuantizeBlockFp8(block):
            weight, scale = quantize(given.weights[0], block)
            return Arrays([weight], [scale])


def _both(given: Arrays) -> tuple[list[Any], list[Any]]:
    return given.weights, given.scales


def dequantize(
    weight: mx.array | Stack, scale: mx.array, block: tuple[int, int], dtype: str
) -> mx.array:
    """Multiply E4M3 bytes by their block scales.

    Args:
        weight: ``[…, O, I]``, uint8.
        scale: ``[…, ceil(O/b0), ceil(I/b1)]``, any float.
        block: ``(b0, b1)``.
        dtype: of the result.

    Returns:
        ``[…, O, I]``, evaluated where it took more than one step.
    """
    *lead, rows, columns = weight.shape
    count = 1
    for axis in lead:
        count *= axis
    if not isinstance(weight, Stack):
        weight = weight.reshape(count, rows, columns)
    scale = scale.reshape(count, *scale.shape[-2:])

    row_bytes = 4 * max(columns, 1)
    at_once = max(1, TEMPORARY_BYTES // max(rows * row_bytes, 1))
    band = rows
    if rows * row_bytes > TEMPORARY_BYTES:
        band = max(1, TEMPORARY_BYTES // row_bytes // block[0]) * block[0]
    if count <= at_once and band >= rows:
        whole = weight.take(0, count) if isinstance(weight, Stack) else weight
        return _product(whole, scale, block, dtype).reshape(*lead, rows, columns)

    # Writing into one buffer, each step evaluated, keeps one copy: MLX updates
    # a buffer in place while nothing else refers to it.
    out = mx.zeros((count, rows, columns), dtype=_DTYPES[dtype])
    mx.eval(out)
    for start in range(0, count, at_once):
        stop = min(start + at_once, count)
        chunk = weight.take(start, stop) if isinstance(weight, Stack) else weight[start:stop]
        for top in range(0, rows, band):
            grid = scale[start:stop, top // block[0] : -(-(top + band) // block[0])]
            part = _product(chunk[:, top : top + band], grid, block, dtype)
            out[start:stop, top : top + band] = part
            del part
            mx.eval(out)
    return out.reshape(*lead, rows, columns)


def _product(weight: mx.array, scale: mx.array, block: tuple[int, int], dtype: str) -> mx.array:
    """Return ``[N, O, I]`` times ``[N, o, i]``, formed in float32, rounded once."""
    count, rows, columns = weight.shape
    exact = mx.from_fp8(weight, dtype=mx.float32)
    scale = scale.astype(mx.float32)
    if rows % block[0] or columns % block[1]:
        scale = mx.repeat(scale, block[1], axis=2)[:, :, :columns]
        product = exact * mx.repeat(scale, block[0], axis=1)[:, :rows]
    else:
        tiles = exact.reshape(count, rows // block[0], block[0], columns // block[1], block[1])
        product = (tiles * scale[:, :, None, :, None]).reshape(count, rows, columns)
    return product.astype(_DTYPES[dtype])


def quantize(weight: mx.array, block: tuple[int, int]) -> tuple[mx.array, mx.array]:
    """Return E4M3 bytes ``[…, O, I]`` and float32 scales ``[…, o, i]``.

    The inverse of ``dequantize``, up to E4M3's rounding.
    """
    *lead, rows, columns = weight.shape
    padded = mx.pad(
        weight.astype(mx.float32),
        [(0, 0)] * len(lead) + [(0, -rows % block[0]), (0, -columns % block[1])],
    )
    grid = (padded.shape[-2] // block[0], padded.shape[-1] // block[1])
    tiles = padded.reshape(*lead, grid[0], block[0], grid[1], block[1])
    largest = mx.abs(tiles).max(axis=(-3, -1))
    scale = mx.where(largest == 0, 1.0, largest / E4M3_MAX)
    quotient = mx.clip(tiles / scale[..., :, None, :, None], -E4M3_MAX, E4M3_MAX)
    packed = mx.to_fp8(quotient).reshape(padded.shape)
    return packed[..., :rows, :columns], scale
