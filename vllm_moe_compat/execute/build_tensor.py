"""Make the tensors of one build, packed where they are to be quantised.

Large tensors go from their sources into the targets' buffers a few experts at a time, through
dequantising, transposing, splitting and packing. Neither a bfloat16 copy nor a combined tensor
is ever held as a whole beside the result. Sources that are stored tensors are read on the way:
only the region that a restricted build needs, and experts a few at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.operations import Dequantize, MlxFormat, Op
from vllm_moe_compat.execute.arrays import Band, bands, ready, run
from vllm_moe_compat.execute.laziness import is_lazy, settle
from vllm_moe_compat.execute.numbers import executor_of
from vllm_moe_compat.execute.stack import Arrays, Stack, as_whole
from vllm_moe_compat.execute.stored_tensors import Source, as_array
from vllm_moe_compat.plan.build import Build, Restriction, Span
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts, Transpose
from vllm_moe_compat.plan.packing import Packing, Requantize


def make_build(
    build: Build,
    weights: MutableMapping[str, Any],
    dtype: str,
    *,
    names: Sequence[str] = (),
    formats: Sequence[Packing | None] = (),
) -> dict[str, mx.array]:
    """Run a build; its sources are removed from ``weights``.

    Args:
        build: of a plan for these tensors.
        weights: name → array, mostly unread, or stored tensor.
        dtype: dtype of dequantised weights.
        names: names of the results; the build's targets by default.
        formats: packed format of each result; None, or no entry, for floats. Results are held
            in an ``MlxFormat`` all together or not at all.

    Returns:
        Name → target, evaluated unless tensors are made lazily (``laziness``); a packed target
        gives ``….weight``, ``….scales``, in affine formats ``….biases``, and ``….global_scale``
        where the format has one.
    """
    return run_build(build, take(build, weights), dtype, names=names, formats=formats)


def run_build(
    build: Build,
    operand: Arrays,
    dtype: str,
    *,
    names: Sequence[str] = (),
    formats: Sequence[Packing | None] = (),
) -> dict[str, mx.array]:
    """Run a build on the region of its sources, as ``take`` returns it; see ``make_build``."""
    names = names or build.targets
    if build.restriction is None:
        return make_tensors(build.ops, operand, names, dtype, formats)
    if any(isinstance(packing, MlxFormat) for packing in formats):
        made = make_tensors(build.ops, operand, names, dtype, formats)
        return {name: _trimmed_words(name, array, build) for name, array in made.items()}
    if (cut := _rest(build)) == Restriction():
        return make_tensors(build.ops, operand, names, dtype, formats)
    whole = make_tensors(build.ops, operand, names, dtype)
    arrays: list[mx.array] = []
    for name in names:
        # A copy, since a view would keep what was read around it.
        arrays.append(mx.contiguous(as_array(_cut(whole.pop(name), cut))))
        settle(arrays[-1])
    each: dict[str, mx.array] = {}
    for number, name in enumerate(names):
        operand = Arrays([arrays.pop(0)])
        each |= make_tensors((), operand, [name], dtype, formats[number : number + 1])
    return each


def take(build: Build, weights: MutableMapping[str, Any]) -> Arrays:
    """Remove the build's sources from ``weights`` and return their region that is read.

    The weights of the result may be stored tensors that are still unread; the parts are read.
    """
    operand = take_unread(build, weights)
    parts = {role: [as_array(part) for part in parts] for role, parts in operand.parts.items()}
    return Arrays(operand.weights, parts)


def take_unread(build: Build, weights: MutableMapping[str, Any]) -> Arrays:
    """Remove the build's sources from ``weights`` and return their region; nothing is read."""
    operand = Arrays(
        [weights.pop(name) for name in build.weights],
        {role: [weights.pop(name) for name in names] for role, names in build.parts},
    )
    region = build.region
    if region == Restriction():
        return operand
    shape = tuple(operand.weights[0].shape)
    op = build.dequantize
    if op is None:
        # A view of an array would keep the whole array.
        return Arrays([_copied(_cut(array, region)) for array in operand.weights])
    executor = executor_of(op)
    cut = [executor.region(op, array, region) for array in operand.weights]
    parts: dict[str, list[Source]] = {}
    for number in range(len(cut)):
        given = {role: arrays[number] for role, arrays in operand.parts.items()}
        for role, part in executor.restrict(op, given, shape, region).items():
            parts.setdefault(role, []).append(part)
    return Arrays(cut, parts)


def _copied(part: Source) -> Source:
    return mx.contiguous(part) if isinstance(part, mx.array) else part


def _cut(array: Source, region: Restriction) -> Source:
    if region.experts is not None:
        array = array[slice(*region.experts)]
    if region.rows is not None:
        array = array[..., slice(*region.rows), :]
    return array if region.columns is None else array[..., slice(*region.columns)]


def _rest(build: Build) -> Restriction:
    """Return what to cut of the targets, of which whole blocks were read."""
    wanted, region = build.restriction, build.region
    assert wanted is not None
    rows, columns = region.rows, region.columns
    if any(isinstance(op, Transpose) for op in build.ops):
        rows, columns = columns, rows
    experts = wanted.experts if region.experts is None else None
    return Restriction(experts, _within(wanted.rows, rows), _within(wanted.columns, columns))


def _trimmed_words(name: str, array: mx.array, build: Build) -> mx.array:
    """Cut one tensor of a held target down to the restriction, whose columns are whole groups."""
    wanted, region, held = build.restriction, build.region, build.held
    assert wanted is not None
    assert held is not None
    if region.experts is None and wanted.experts is not None:
        array = array[slice(*wanted.experts)]
    if name.endswith(".global_scale"):
        return array
    if (rows := _within(wanted.rows, region.rows)) is not None:
        array = array[..., slice(*rows), :]
    if (columns := _within(wanted.columns, region.columns)) is not None:
        words = name.endswith(".weight")
        first, last = (n * held.bits // 32 if words else n // held.group for n in columns)
        array = array[..., first:last]
    array = mx.contiguous(array)
    settle(array)
    return array


def _within(span: Span | None, read: Span | None) -> Span | None:
    """Return a span relative to the span that was read; None means all of it."""
    if span is None or span == read:
        return None
    return span if read is None else (span[0] - read[0], span[1] - read[0])


def make_tensors(
    ops: Sequence[Op],
    operand: Arrays,
    names: Sequence[str],
    dtype: str,
    formats: Sequence[Packing | None] = (),
) -> dict[str, mx.array]:
    """Run operations on ``operand``, which is emptied; see ``make_build``."""
    # The caller still refers to the operand, which would keep every source alive to the end.
    operand, spent = Arrays(list(operand.weights), dict(operand.parts)), operand
    spent.weights.clear()
    spent.parts.clear()
    packings = [*formats, *[None] * (len(names) - len(formats))]
    if not ops and not any(packings):
        # Only a new name; an array is still unread.
        return dict(zip(names, map(as_array, operand.weights), strict=True))
    if not _streams(ops, operand, packed=any(packings)):
        for op in ops:
            operand = run(op, operand, dtype)
        weights = [as_whole(w) for w in operand.weights]
        operand.weights.clear()
        if not any(packings):
            settle(weights)
            return dict(zip(names, weights, strict=True))
        made: dict[str, mx.array] = {}
        for name, packing in zip(names, packings, strict=True):
            weight = weights.pop(0)
            targets = [_Target(tuple(weight.shape), packing)]
            made |= _fill(bands(weight, None, {}, dtype), [name], targets, None)
        return made

    dequantize: Dequantize | None = None
    transposed, split = False, None
    for op in ops:
        match op:
            case Dequantize():
                dequantize = op
            case Transpose():
                transposed = True
            case SplitGateUp():
                split = op
            case _:
                operand = run(op, operand, dtype)
    (weight,) = operand.weights
    parts: Mapping[str, mx.array] = operand.only()
    operand.weights.clear()
    operand.parts.clear()
    stored = tuple(weight.shape)
    *lead, rows, columns = stored if dequantize is None else dequantize.logical(stored)
    if transposed:
        rows, columns = columns, rows
    shape = (*lead, rows // 2 if split else rows, columns)
    interleaved = split is not None and split.interleaved
    plain = not (transposed or interleaved or any(packings)) and isinstance(weight, Stack)
    if plain and dequantize is not None:
        filled = executor_of(dequantize).fill(dequantize, weight, parts, dtype, len(names))
        if filled is not None:
            return dict(zip(names, filled, strict=True))
    held = [packing for packing in packings if isinstance(packing, MlxFormat)]
    if dequantize is not None:
        parts = ready(weight, dequantize, parts)
    whole = transposed or interleaved
    targets = [_Target(shape, packing) for packing in packings]

    def pending() -> list[mx.array]:
        """Return the buffers, so that a graph reads a few experts after the others are done."""
        return [buffer for target in targets for buffer in target.buffers] if is_lazy() else []

    given = bands(weight, dequantize, parts, dtype, whole=whole, held=bool(held), pending=pending)
    shared: mx.array | None = None
    if dequantize is not None and held and held[0].global_scale:
        shared = executor_of(dequantize).global_scale(dequantize, parts).reshape(*lead, -1)
    del weight, parts
    if transposed:
        given = _transposed(given)
    made = _fill(given, names, targets, split)
    if shared is not None:
        for number, name in enumerate(names):
            mine = mx.contiguous(shared[..., min(number, shared.shape[-1] - 1)])
            made[f"{name.removesuffix('.weight')}.global_scale"] = mine
        settle(made)
    return made


def _streams(ops: Sequence[Op], operand: Arrays, *, packed: bool) -> bool:
    """Whether the operations run on a few experts at a time.

    Not for stacking alone, which is a single call of MLX; nor for vectors and for the
    operations on a few tensors per layer, which are small.
    """
    if ops and not packed and all(isinstance(op, StackExperts) for op in ops):
        return False
    known = (StackExperts, Dequantize, Transpose, SplitGateUp)
    return operand.weights[0].ndim > 1 and all(
        isinstance(op, known) and not (isinstance(op, SplitGateUp) and op.axis != -2) for op in ops
    )


def _transposed(given: Iterator[Band]) -> Iterator[Band]:
    for experts, _, arrays in given:
        turned = arrays.pop().swapaxes(-1, -2)
        yield experts, slice(0, turned.shape[-2]), [turned]


def _fill(
    given: Iterator[Band],
    names: Sequence[str],
    targets: list[_Target],
    split: SplitGateUp | None,
) -> dict[str, mx.array]:
    """Write bands of ``[…, k·O, I]`` into the buffers of ``k`` targets ``[…, O, I]``."""
    rows = targets[0].rows
    for experts, band, arrays in given:
        for number, target in enumerate(targets):
            if split is not None and split.interleaved:
                target.put(experts, slice(0, rows), [array[:, number::2] for array in arrays])
                continue
            low, high = max(band.start, number * rows), min(band.stop, (number + 1) * rows)
            if low < high:
                piece = [array[:, low - band.start : high - band.start] for array in arrays]
                target.put(experts, slice(low - number * rows, high - number * rows), piece)
                del piece
        arrays.clear()
        settle([target.buffers for target in targets])
    return {
        f"{name.removesuffix('.weight')}.{kind}" if target.packed else name: array
        for name, target in zip(names, targets, strict=True)
        for kind, array in target.arrays().items()
    }


class _Target:
    """The buffers of one target ``[…, O, I]``, filled a piece at a time."""

    def __init__(self, shape: tuple[int, ...], packing: Packing | None) -> None:
        self._shape, self._packing = shape, packing
        self.buffers: list[mx.array] = []

    @property
    def rows(self) -> int:
        """``O``."""
        return self._shape[-2]

    @property
    def packed(self) -> bool:
        """Whether the target is quantised."""
        return self._packing is not None

    def put(self, experts: slice, rows: slice, parts: list[mx.array]) -> None:
        """Write ``[n, o, I]``, quantised if the target is, or words with their scales; lazy."""
        if isinstance(self._packing, Requantize):
            bits, group, mode = self._packing.bits, self._packing.group, self._packing.mode
            parts = list(mx.quantize(parts.pop(), group, bits, mode=mode))
        *lead, height, _ = self._shape
        count = math.prod(lead)
        if parts[0].shape[:2] == (count, height):
            # The whole target at once: copied, since a view would keep its parent alive.
            self.buffers = [mx.contiguous(part) for part in parts]
            return
        if not self.buffers:
            # MLX updates a buffer in place while nothing else refers to it. The caller
            # evaluates after each piece, so there is never a second copy.
            self.buffers = [
                mx.zeros((count, height, part.shape[-1]), dtype=part.dtype) for part in parts
            ]
            settle(self.buffers)
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer[experts, rows] = part

    def arrays(self) -> dict[str, mx.array]:
        """Return parameter of the module (``weight``, ``scales``, ``biases``) → array."""
        lead = self._shape[:-1]
        kinds = ("weight", "scales", "biases")
        return {
            kind: buffer.reshape(*lead, buffer.shape[-1])
            for kind, buffer in zip(kinds, self.buffers, strict=False)
        }
