"""FP4 on MLX arrays: held as it is, or bytes times scales.

MLX's modes ``nvfp4`` and ``mxfp4`` have the published order of nibbles and the published scales,
so holding a weight reinterprets its bytes as words. Dequantising goes through MLX too: the
product of value and scale is exact in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from vllm_moe_compat.checkpoint.numbers.fp4_ops import GLOBAL, SCALE, DequantizeFp4
from vllm_moe_compat.checkpoint.operations import Dequantize, Op
from vllm_moe_compat.dtypes import mlx_dtype
from vllm_moe_compat.execute import fp8_pairs
from vllm_moe_compat.execute.fp8_tables import Bits
from vllm_moe_compat.execute.numbers.executor import Executor, HeldPart, Parts
from vllm_moe_compat.execute.stack import Arrays
from vllm_moe_compat.execute.stored_tensors import Source
from vllm_moe_compat.plan.build import Restriction

MLX_GLOBAL = 6.0 * 448.0
"""MLX's global scale is that of the largest value: the largest E2M1 times the largest E4M3."""


class Fp4Executor(Executor):
    """Runs ``DequantizeFp4``."""

    def ready(self, op: DequantizeFp4, parts: Parts, shape: tuple[int, int, int]) -> Parts:
        """Return scales as bytes ``[N, O, I/g]``, and global scales as float32 ``[N, k]``.

        ``k`` is 2 where gate and up of combined experts have one each, else 1.
        """
        count, rows, columns = op.logical(shape)
        scale = parts[SCALE]
        if op.turned:
            scale = scale.reshape(count, columns // op.group, rows).swapaxes(-1, -2)
        found = {SCALE: mx.contiguous(scale.reshape(count, rows, columns // op.group))}
        if op.shared:
            shared = parts[GLOBAL].astype(mx.float32).flatten()
            if shared.size == 1:
                shared = mx.broadcast_to(shared, (count,))
            found[GLOBAL] = shared.reshape(count, -1)
        return found

    def cut(self, op: DequantizeFp4, weight: mx.array, rows: slice) -> mx.array:
        """Return rows of bytes, ``[n, o, I/2]``."""
        return weight[:, :, rows].swapaxes(-1, -2) if op.turned else weight[:, rows]

    def floats(
        self,
        op: DequantizeFp4,
        weight: mx.array,
        parts: Parts,
        experts: slice,
        rows: slice,
        dtype: str,
    ) -> mx.array:
        """Multiply in float32 and round once."""
        words, scales = self.packed(op, weight, parts, experts, rows)
        values = mx.dequantize(words, scales, None, op.group, 4, mode=op.mode, dtype=mx.float32)
        if op.shared:
            shared = parts[GLOBAL][experts]
            whole = parts[SCALE].shape[1]
            by_row = mx.repeat(shared, whole // shared.shape[1], axis=1)[:, rows, None]
            values = values / by_row if op.divides else values * by_row
        return values.astype(mlx_dtype(dtype))

    def packed(
        self, op: DequantizeFp4, weight: mx.array, parts: Parts, experts: slice, rows: slice
    ) -> tuple[mx.array, ...]:
        """Return the bytes as words, and the scales' bytes."""
        return mx.contiguous(weight).view(mx.uint32), parts[SCALE][experts, rows]

    def global_scale(self, op: DequantizeFp4, parts: Parts) -> mx.array:
        """Return MLX's global scales, float32 ``[N, k]``."""
        shared = parts[GLOBAL]
        return MLX_GLOBAL / shared if op.divides else shared * MLX_GLOBAL

    def region(self, op: DequantizeFp4, weight: Source, region: Restriction) -> Source:
        """Return the bytes of a region of whole groups."""
        return super().region(op, weight, _stored(op, region, 2))

    def holds_bytes(self, op: DequantizeFp4, roles: Collection[str]) -> bool:
        """Whether rows are stored as rows."""
        return not op.turned

    def held_parts(self, op: DequantizeFp4, operand: Arrays) -> list[HeldPart]:
        """Return bytes, scales and global scale, which alone is computed."""
        parts: dict[str, Any] = operand.only()
        found = [HeldPart("weight", operand.weights[0]), HeldPart("scales", parts[SCALE])]
        if (shared := parts.get(GLOBAL)) is not None:
            found.append(HeldPart("global_scale", shared, partial(_global_scale, op, shared.kind)))
        return found

    def restrict(
        self,
        op: Dequantize,
        parts: Mapping[str, Source],
        shape: tuple[int, ...],
        region: Restriction,
    ) -> dict[str, Source]:
        """Return the scales of a region; global scales are cut to its experts."""
        assert isinstance(op, DequantizeFp4)
        found = {SCALE: super().region(op, parts[SCALE], _stored(op, region, op.group))}
        if op.shared:
            shared = parts[GLOBAL]
            if region.experts is not None and shared.size > 1:
                shared = shared.reshape(shape[0], -1)[slice(*region.experts)]
            found[GLOBAL] = shared
        return found

    def quantize(self, op: Op, given: Arrays) -> Arrays:
        """FP4 is read and not written.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("FP4 is not written")


def _global_scale(op: DequantizeFp4, kind: str, stored: Bits) -> Bits:
    """Return MLX's global scales ``[k]``, as ``Fp4Executor.global_scale`` does."""
    shared, factor = fp8_pairs.scales(stored, kind), np.float32(MLX_GLOBAL)
    found: Bits = factor / shared if op.divides else shared * factor
    return found


def _stored(op: DequantizeFp4, region: Restriction, per: int) -> Restriction:
    """Return a region of tensors that hold ``per`` columns in one, as they are stored."""
    columns = region.columns
    fewer = None if columns is None else (columns[0] // per, columns[1] // per)
    if op.turned:
        return Restriction(region.experts, fewer, region.rows)
    return Restriction(region.experts, region.rows, fewer)


EXECUTORS: dict[type[Op], Executor] = {DequantizeFp4: Fp4Executor()}
