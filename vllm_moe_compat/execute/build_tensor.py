"""One build of a plan becomes arrays, packed at once where they are to be quantised.

In go the build's operations and its sources, still unread; out come the targets'
arrays, evaluated. Large tensors pass a few experts at a time from their sources into
the targets' buffers, through dequantising, transposing, splitting and packing, so
neither a bfloat16 copy nor a fused tensor is ever held whole besides its result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import mlx.core as mx

from vllm_moe_compat.execute import fp8_tables as lookup
from vllm_moe_compat.execute.arrays import (
    DTYPES,
    Arrays,
    Stack,
    factors,
    floats,
    multiplied_in,
    run,
)
from vllm_moe_compat.plan.ops import DequantizeFp8, Op, SplitGateUp, StackExperts, Transpose
from vllm_moe_compat.plan.packing import Requantize
from vllm_moe_compat.plan.planner import Build


def take(build: Build, weights: MutableMapping[str, mx.array]) -> Arrays:
    """Take the build's sources out of ``weights``."""
    return Arrays(
        [weights.pop(name) for name in build.weights],
        [weights.pop(name) for name in build.scales],
    )


def make(
    ops: Sequence[Op],
    operand: Arrays,
    names: Sequence[str],
    dtype: str,
    formats: Sequence[Requantize | None] = (),
) -> dict[str, mx.array]:
    """Carry out operations on ``operand``, which is emptied.

    Args:
        ops: of one build.
        operand: its sources.
        names: of what comes out.
        dtype: what dequantising gives.
        formats: how each of the targets is packed; None, or no entry, for not at all.

    Returns:
        The targets under their names, evaluated; packed ones as ``….weight``,
        ``….scales`` and, if their format has them, ``….biases``.
    """
    # The caller's reference would keep every source alive to the end.
    operand, spent = Arrays(list(operand.weights), list(operand.scales)), operand
    spent.weights.clear()
    spent.scales.clear()
    packings = [*formats, *[None] * (len(names) - len(formats))]
    if not ops and not any(packings):
        return {names[0]: operand.weights.pop()}  # Another name only; stays unread.
    if not _streams(ops, operand, packed=any(packings)):
        for op in ops:
            operand = run(op, operand, dtype)
        weights = [t.all() if isinstance(t, Stack) else t for t in operand.weights]
        operand.weights.clear()
        if not any(packings):
            mx.eval(weights)
            return dict(zip(names, weights, strict=True))
        made: dict[str, mx.array] = {}
        for name, packing in zip(names, packings, strict=True):
            weight = weights.pop(0)
            targets = [_Target(weight.shape, packing)]
            made |= _fill(floats(weight, None, (1, 1), dtype), [name], targets, None)
        return made

    block, transposed, split = (1, 1), False, None
    for op in ops:
        match op:
            case DequantizeFp8(size):
                block = size
            case Transpose():
                transposed = True
            case SplitGateUp():
                split = op
            case _:
                operand = run(op, operand, dtype)
    (weight,) = operand.weights
    scale = operand.scales[0] if operand.scales else None
    operand.weights.clear()
    *lead, rows, columns = weight.shape
    if transposed:
        rows, columns = columns, rows
    shape = (*lead, rows // 2 if split else rows, columns)
    interleaved = split is not None and split.interleaved
    plain = not (transposed or interleaved or any(packings)) and isinstance(weight, Stack)
    if plain and scale is not None and lookup.pays(rows, columns, block):
        return _looked_up(weight, scale, block, dtype, dict.fromkeys(names, shape))
    whole = transposed or interleaved
    parts = floats(weight, scale, block, dtype, whole=whole)
    del weight, scale
    if transposed:
        parts = _transposed(parts)
    return _fill(parts, names, [_Target(shape, packing) for packing in packings], split)


def _looked_up(
    weight: Stack,
    scale: mx.array,
    block: tuple[int, int],
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, mx.array]:
    """Write FP8 experts ``[k·O, I]`` straight into ``k`` targets ``[E, O, I]``, one by one."""
    count, rows, columns = weight.shape
    grid = (count, -(-rows // block[0]), -(-columns // block[1]))
    tables = lookup.Tables(factors(scale, grid), block, columns, multiplied_in(dtype))
    made = {name: mx.zeros(shape, dtype=DTYPES[dtype]) for name, shape in shapes.items()}
    views = [lookup.bits(array) for array in made.values()]
    share = rows // len(views)
    for expert in range(count):
        source = lookup.bits(weight.pop(expert))
        for number, view in enumerate(views):
            first = number * share
            tables.write(expert, first, source[first : first + share], view[expert])
    return made


def _streams(ops: Sequence[Op], operand: Arrays, *, packed: bool) -> bool:
    """Whether the operations can be carried out a few experts at a time.

    Stacking alone is one call of MLX, which no loop improves on; vectors and what
    few tensors need other operations are small.
    """
    if ops and not packed and all(isinstance(op, StackExperts) for op in ops):
        return False
    known = (StackExperts, DequantizeFp8, Transpose, SplitGateUp)
    return operand.weights[0].ndim > 1 and all(
        isinstance(op, known) and not (isinstance(op, SplitGateUp) and op.axis != -2) for op in ops
    )


Parts = Iterator[tuple[slice, slice, Any]]


def _transposed(parts: Parts) -> Parts:
    for experts, _, part in parts:
        turned = part.swapaxes(-1, -2)
        del part
        yield experts, slice(0, turned.shape[-2]), turned


def _fill(
    parts: Parts, names: Sequence[str], targets: list[_Target], split: SplitGateUp | None
) -> dict[str, mx.array]:
    """Write parts of ``[…, k·O, I]`` into the buffers of ``k`` targets ``[…, O, I]``."""
    rows = targets[0].rows
    for experts, band, part in parts:
        for number, target in enumerate(targets):
            if split is not None and split.interleaved:
                target.put(experts, slice(0, rows), part[:, number::2])
                continue
            low, high = max(band.start, number * rows), min(band.stop, (number + 1) * rows)
            if low < high:
                piece = part[:, low - band.start : high - band.start]
                target.put(experts, slice(low - number * rows, high - number * rows), piece)
                del piece
        del part
        mx.eval([target.buffers for target in targets])
    return {
        f"{name.removesuffix('.weight')}.{kind}" if target.packed else name: array
        for name, target in zip(names, targets, strict=True)
        for kind, array in target.arrays().items()
    }


class _Target:
    """The buffers of one target ``[…, O, I]``, filled a piece at a time."""

    def __init__(self, shape: tuple[int, ...], packing: Requantize | None) -> None:
        self._shape, self._packing = shape, packing
        self.buffers: list[mx.array] = []

    @property
    def rows(self) -> int:
        """``O``."""
        return self._shape[-2]

    @property
    def packed(self) -> bool:
        """Whether it is quantised."""
        return self._packing is not None

    def put(self, experts: slice, rows: slice, piece: mx.array) -> None:
        """Write ``[n, o, I]``, packed, into its place; not evaluated."""
        found = [piece]
        if self._packing is not None:
            bits, group, mode = self._packing.bits, self._packing.group, self._packing.mode
            found = list(mx.quantize(piece, group, bits, mode=mode))
        *lead, height, _ = self._shape
        count = math.prod(lead)
        if piece.shape[:2] == (count, height):
            # All at once: a copy, since a slice would keep what it is a part of alive.
            self.buffers = [mx.contiguous(part) for part in found]
            return
        if not self.buffers:
            # Writing into one buffer, each step evaluated, keeps one copy: MLX
            # updates a buffer in place while nothing else refers to it.
            self.buffers = [
                mx.zeros((count, height, part.shape[-1]), dtype=part.dtype) for part in found
            ]
            mx.eval(self.buffers)
        for buffer, part in zip(self.buffers, found, strict=True):
            buffer[experts, rows] = part

    def arrays(self) -> dict[str, mx.array]:
        """Return the finished parameters by their name in the module."""
        lead = self._shape[:-1]
        kinds = ("weight", "scales", "biases")
        return {
            kind: buffer.reshape(*lead, buffer.shape[-1])
            for kind, buffer in zip(kinds, self.buffers, strict=False)
        }
