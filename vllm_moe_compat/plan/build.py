"""A ``Build``: one tensor to make, as data, optionally restricted to a part.

A build may be restricted to some experts, rows or columns of its targets ``[E, O, I]``, such as
one expert that is read from disk, or the share of one rank. The restriction is part of the
build, so the sources that are read, the memory estimate and the checks follow it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.checkpoint.operations import Dequantize, MlxFormat, Op, Operand, Spec
from vllm_moe_compat.dtypes import nbytes
from vllm_moe_compat.plan.ops import AsWords, SplitGateUp, StackExperts, Transpose

Span: TypeAlias = tuple[int, int]
"""``(start, stop)`` along one axis."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """The part of a build's targets ``[E, O, I]`` to make; None stands for the whole axis."""

    experts: Span | None = None
    rows: Span | None = None
    columns: Span | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of this part of a tensor ``[…, O, I]``, or of biases ``[…, O]``.

        The rows of biases are their columns here.
        """
        shape = list(whole)
        for axis, span in ((0, self.experts), (-2, self.rows), (-1, self.columns)):
            if span is not None:
                shape[axis] = _length(span)
        return tuple(shape)

    def of(self, part: Restriction) -> Restriction:
        """Return ``part``, which is relative to this part, relative to the whole."""
        return Restriction(
            _inside(self.experts, part.experts),
            _inside(self.rows, part.rows),
            _inside(self.columns, part.columns),
        )


def _length(span: Span) -> int:
    return span[1] - span[0]


def _inside(outer: Span | None, inner: Span | None) -> Span | None:
    if outer is None or inner is None:
        return inner or outer
    return (outer[0] + inner[0], outer[0] + inner[1])


@dataclass(frozen=True, slots=True)
class Build:
    """One tensor to make.

    Attributes:
        target: name of the tensor.
        weights: source tensors with the numbers, in order.
        parts: pairs of role and the further source tensors of ``weights``, in the same order;
            empty for floats.
        ops: operations, first to last; empty for a tensor that is only renamed.
        others: names of further targets, if the operations give more than one weight.
        restriction: the part of the targets to make; None for all of it.
        held: the packed format in which MLX can hold the targets as they are stored; None if
            they become floats. The load still needs a module that has a packed form.
    """

    target: str
    weights: tuple[str, ...]
    parts: tuple[tuple[str, tuple[str, ...]], ...]
    ops: tuple[Op, ...]
    others: tuple[str, ...] = ()
    restriction: Restriction | None = None
    held: MlxFormat | None = None

    @property
    def dequantize(self) -> Dequantize | None:
        """The operation that dequantises the weights; None for floats."""
        return next((op for op in self.ops if isinstance(op, Dequantize)), None)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of all tensors that the build makes, in the operations' order."""
        return (self.target, *self.others)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all source tensors."""
        return (*self.weights, *(name for _, names in self.parts for name in names))

    @property
    def layer(self) -> str:
        """Path of the target's layer, or the target's name outside of layers."""
        layer = layer_of(self.target)
        return layer.path if layer else self.target

    def results(self, tensors: Mapping[str, TensorInfo], dtype: str) -> tuple[Spec, ...]:
        """Return dtypes and shapes of the targets as floats.

        Args:
            tensors: descriptions of the sources.
            dtype: dtype of dequantised weights (safetensors' name).

        Raises:
            ValueError: an operation does not apply to its operand.
        """
        parts = {role: _specs(names, tensors) for role, names in self.parts}
        operand = Operand(_specs(self.weights, tensors), parts)
        for op in self.ops:
            operand = op.result(operand, dtype)
        if self.restriction is None:
            return operand.weights
        return tuple(
            Spec(spec.dtype, self.restriction.shape(spec.shape)) for spec in operand.weights
        )

    def restricted(self, to: Restriction) -> Build:
        """Return the build of a part of the targets ``[…, O, I]``, as this build makes them.

        Of per-expert sources only the restricted experts remain; of other sources ``region``
        is read. Packed words are cut between groups only; for other columns the targets become
        floats.
        """
        if self.restriction is not None:
            to = self.restriction.of(to)
        if self.held is not None and any(n % self.held.group for n in to.columns or ()):
            return replace(self, held=None, restriction=None).restricted(to)
        stack = next((op for op in self.ops if isinstance(op, StackExperts)), None)
        if stack is None or to.experts is None:
            return replace(self, restriction=None if to == Restriction() else to)
        chosen = slice(*to.experts)
        ops = tuple(StackExperts(_length(to.experts)) if op is stack else op for op in self.ops)
        rest = replace(to, experts=None)
        return replace(
            self,
            weights=self.weights[chosen],
            parts=tuple((role, names[chosen]) for role, names in self.parts),
            ops=ops,
            restriction=None if rest == Restriction() else rest,
        )

    @property
    def region(self) -> Restriction:
        """The part of each source weight to read.

        Rows and columns are widened to whole blocks of the parts. Combined gate and up are read
        with all rows. Operations that do not map rows to rows need their sources whole.
        """
        if self.restriction is None:
            return Restriction()
        experts, rows, columns = (
            self.restriction.experts,
            self.restriction.rows,
            self.restriction.columns,
        )
        for op in reversed(self.ops):
            match op:
                case Transpose():
                    rows, columns = columns, rows
                case SplitGateUp(axis=axis):
                    rows, columns = (None, columns) if axis == -2 else (rows, None)
                case Dequantize():
                    rows = _widened(rows, op.rows_per_part)
                    columns = _widened(columns, op.columns_per_part)
                case StackExperts():
                    experts = None
                case AsWords(grouped=grouped):
                    rows, columns = None if grouped else rows, None
                case _:
                    return Restriction()
        return Restriction(experts, rows, columns)

    def bytes_read(self, tensors: Mapping[str, TensorInfo]) -> int:
        """Return the bytes of the sources' regions that are read.

        Parts of fewer axes than their weight have all rows and columns counted.
        """
        region, op = self.region, self.dequantize
        first = tensors[self.weights[0]].shape
        whole = first if op is None else op.logical(first)
        read = 0
        for name in self.sources:
            info = tensors[name]
            shape = list(info.shape)
            if region.experts is not None and math.prod(shape) > 1 and shape[0] == first[0]:
                shape[0] = _length(region.experts)
            if len(shape) == len(first) and math.prod(shape) > 1:
                rows, columns = (-1, -2) if op is not None and op.exchanged else (-2, -1)
                if region.rows is not None:
                    block = 1 if op is None else op.rows_per_part
                    shape[rows] = _entries(region.rows, whole[-2], shape[rows], block)
                if region.columns is not None:
                    block = 1 if op is None else op.columns_per_part
                    shape[columns] = _entries(region.columns, whole[-1], shape[columns], block)
            read += nbytes(info.dtype, tuple(shape))
        return read


def _entries(span: Span, size: int, entries: int, block: int) -> int:
    """Return how many of an axis's entries belong to a span of the ``size`` rows or columns.

    An entry belongs to a block, or all entries to equally many.
    """
    first, last = span[0], min(span[1], size)
    if entries == -(-size // block):
        return -(-last // block) - first // block
    return -(-last * entries // size) - first * entries // size


def _widened(span: Span | None, block: int) -> Span | None:
    """Return the span of whole blocks; the last block may end beyond the tensor."""
    return None if span is None else (span[0] // block * block, -(-span[1] // block) * block)


def _specs(names: tuple[str, ...], tensors: Mapping[str, TensorInfo]) -> tuple[Spec, ...]:
    """Describe the sources of one build; the checks have ensured that they are equal."""
    return tuple(Spec(tensors[n].dtype, tensors[n].shape) for n in names[:1]) * len(names)
