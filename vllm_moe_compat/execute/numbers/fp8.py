"""FP8 on MLX arrays: bytes times scales, and the inverse.

The product ``q * scale`` is computed in float32 and rounded once to the target dtype, so the
result is bit for bit that of dequantising every expert on its own. On MLX's CPU device large
blocks use lookup tables (``fp8_tables``, ``fp8_pairs``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import mlx.core as mx
import numpy as np

from vllm_moe_compat.checkpoint.numbers.fp8_ops import (
    SCALE,
    DequantizeFp8,
    QuantizeFp8,
    scale_grid,
)
from vllm_moe_compat.checkpoint.operations import Dequantize, Op
from vllm_moe_compat.dtypes import mlx_dtype
from vllm_moe_compat.execute import fp8_pairs, fp8_tables, stack
from vllm_moe_compat.execute.numbers.executor import Executor, Parts, Writer
from vllm_moe_compat.execute.stack import Arrays, Stack
from vllm_moe_compat.execute.stored_tensors import Source
from vllm_moe_compat.plan.build import Restriction

E4M3_MAX = 448.0


class Fp8Executor(Executor):
    """Runs ``DequantizeFp8`` and ``QuantizeFp8``."""

    def ready(self, op: DequantizeFp8, parts: Parts, shape: tuple[int, int, int]) -> Parts:
        """Return the scales as float32 ``[N, o, i]``."""
        return {SCALE: scales_as_floats(parts[SCALE], scale_grid(shape, op.block))}

    def floats(
        self,
        op: DequantizeFp8,
        weight: mx.array,
        parts: Parts,
        experts: slice,
        rows: slice,
        dtype: str,
    ) -> mx.array:
        """Multiply a band of bytes by its scales."""
        height = op.block[0]
        scale = parts[SCALE][experts, rows.start // height : -(-rows.stop // height)]
        block = (min(height, rows.stop - rows.start), op.block[1])
        return _product(weight, scale, block, dtype)

    def fill(
        self, op: DequantizeFp8, weight: Stack, parts: Parts, dtype: str, targets: int
    ) -> list[mx.array] | None:
        """Write products from lookup tables into the targets, expert by expert."""
        count, rows, columns = weight.shape
        if not fp8_tables.pays(rows, columns, op.block):
            return None
        scale = self.ready(op, parts, (count, rows, columns))[SCALE]
        tables = _writer(scale, op.block, columns, dtype)
        share = rows // targets
        made = [mx.zeros((count, share, columns), dtype=mlx_dtype(dtype)) for _ in range(targets)]
        views = [fp8_tables.bits(array) for array in made]
        for expert in range(count):
            source = fp8_tables.bits(weight.pop(expert))
            for number, view in enumerate(views):
                first = number * share
                tables.write(expert, first, source[first : first + share], view[expert])
        return made

    def writes(
        self, op: DequantizeFp8, rows: int, columns: int, dtype: str, held: mx.Dtype
    ) -> bool:
        """Whether blocks are large and no float16 is wanted."""
        kind = mlx_dtype(dtype)
        if kind not in (mx.float32, mx.bfloat16) or held not in (kind, mx.float32):
            return False
        fp8_pairs.prepare()
        return fp8_tables.pays(rows, columns, op.block)

    def writer(
        self,
        op: DequantizeFp8,
        shape: tuple[int, int],
        parts: Mapping[str, tuple[fp8_tables.Bits, str]],
        dtype: str,
    ) -> Writer:
        """Write products by pairs of bytes."""
        scale, grid = fp8_pairs.scales(*parts[SCALE]), scale_grid((1, *shape), op.block)
        scale = np.broadcast_to(scale, grid) if scale.size == 1 else scale.reshape(grid)
        pairs = fp8_pairs.Pairs(scale, op.block, shape[1], rounded=dtype == "bfloat16")
        return partial(pairs.write, 0)

    def restrict(
        self,
        op: Dequantize,
        parts: Mapping[str, Source],
        shape: tuple[int, ...],
        region: Restriction,
    ) -> dict[str, Source]:
        """Return the scales of the region's blocks; a single scale for the tensor is kept."""
        scale = parts[SCALE]
        if scale.size == 1:
            return {SCALE: scale}
        height, width = op.rows_per_part, op.columns_per_part
        *lead, _, _ = shape
        scale = scale.reshape(*lead, -(-shape[-2] // height), -(-shape[-1] // width))
        if region.experts is not None:
            scale = scale[slice(*region.experts)]
        if region.rows is not None:
            scale = scale[..., region.rows[0] // height : -(-region.rows[1] // height), :]
        if region.columns is not None:
            scale = scale[..., region.columns[0] // width : -(-region.columns[1] // width)]
        return {SCALE: scale}

    def quantize(self, op: Op, given: Arrays) -> Arrays:
        """Quantise one weight."""
        assert isinstance(op, QuantizeFp8)
        weight, scale = quantize(given.weights[0], op.block, e8m0=op.e8m0)
        return Arrays([weight], {SCALE: [scale]})


_EXECUTOR = Fp8Executor()
EXECUTORS: dict[type[Op], Executor] = {DequantizeFp8: _EXECUTOR, QuantizeFp8: _EXECUTOR}


def scales_as_floats(scale: mx.array, grid: tuple[int, ...]) -> mx.array:
    """Return scales as float32 of shape ``grid``; an E8M0 byte ``b`` is ``2 ** (b - 127)``."""
    scale = mx.broadcast_to(scale.flatten(), grid) if scale.size == 1 else scale.reshape(grid)
    if scale.dtype != mx.uint8:
        return scale.astype(mx.float32)
    bits = scale.astype(mx.uint32)
    # The byte is the exponent of a float32. Byte 0, 2 ** -127, is a subnormal number there;
    # byte 255 is NaN.
    exponent = mx.where(bits == 0, mx.array(1 << 22, mx.uint32), bits << 23)
    return mx.where(bits == 255, float("nan"), exponent.view(mx.float32))


def _multiply(dtype: str) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a function that multiplies bytes by scales in float32 and rounds to ``dtype``."""
    return lambda q, s: (mx.from_fp8(q, dtype=mx.float32) * s).astype(mlx_dtype(dtype))


def _writer(
    scale: mx.array, block: tuple[int, int], columns: int, dtype: str
) -> fp8_tables.Tables | fp8_pairs.Pairs:
    """Return what writes products of bytes of ``[…, columns]`` as ``dtype``."""
    if dtype == "float32":
        exact = fp8_tables.bits(mx.contiguous(scale)).view(np.float32)
        return fp8_pairs.Pairs(exact, block, columns)
    return fp8_tables.Tables(scale, block, columns, _multiply(dtype))


def by_table(weight: mx.array, scale: mx.array, block: tuple[int, int], dtype: str) -> mx.array:
    """Return all products, evaluated; on the CPU, and not while tensors are made lazily.

    Args:
        weight: E4M3 bytes, uint8 ``[N, O, I]``.
        scale: float32 ``[N, o, i]``.
        block: rows and columns under one scale.
        dtype: dtype of the products.

    Returns:
        ``[N, O, I]``.
    """
    tables = _writer(scale, block, weight.shape[-1], dtype)
    out = mx.zeros(weight.shape, dtype=mlx_dtype(dtype))
    source, target = fp8_tables.bits(weight), fp8_tables.bits(out)
    for expert in range(len(source)):
        tables.write(expert, 0, source[expert], target[expert])
    return out


def _product(weight: mx.array, scale: mx.array, block: tuple[int, int], dtype: str) -> mx.array:
    """Return ``[N, O, I]`` times ``[N, o, i]``, computed in float32 and rounded once."""
    count, rows, columns = weight.shape
    if fp8_tables.pays(rows, columns, block):
        return by_table(weight, scale, block, dtype)
    exact = mx.from_fp8(weight, dtype=mx.float32)
    if rows % block[0] or columns % block[1]:
        scale = mx.repeat(scale, block[1], axis=2)[:, :, :columns]
        product = exact * mx.repeat(scale, block[0], axis=1)[:, :rows]
    else:
        tiles = exact.reshape(count, rows // block[0], block[0], columns // block[1], block[1])
        product = (tiles * scale[:, :, None, :, None]).reshape(count, rows, columns)
    return product.astype(mlx_dtype(dtype))


def quantize(
    weight: mx.array, block: tuple[int, int], *, e8m0: bool = False
) -> tuple[mx.array, mx.array]:
    """Return E4M3 bytes ``[…, O, I]`` and scales ``[…, o, i]``, float32 or E8M0 bytes.

    This is the inverse of dequantising, up to E4M3's rounding. A few experts are quantised at
    a time.
    """
    *lead, rows, columns = weight.shape
    count = math.prod(lead)
    at_once = max(1, stack.TEMPORARY_BYTES // max(4 * rows * columns, 1))
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
        scale = scales_as_floats(exponent, exponent.shape)
    quotient = mx.clip(tiles / scale[..., :, None, :, None], -E4M3_MAX, E4M3_MAX)
    packed = mx.to_fp8(quotient).reshape(padded.shape)
    return packed[..., :rows, :columns], exponent if e8m0 else scale
