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
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts, Transpose

Span: TypeAlias = tuple[int, int]
"""``(start, stop)`` along one axis."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """The part of a build's targets ``[E, O, I]`` to make; None stands for the whole axis."""

    experts: Span | None = None
    rows: Span | None = None
    columns: Span | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of this part of a tensor ``[…, O, I]``."""
        lead, rows, columns = list(whole[:-2]), *whole[-2:]
        if self.experts is not None:
            lead[0] = _length(self.experts)
        rows = rows if self.rows is None else _length(self.rows)
        columns = columns if self.columns is None else _length(self.columns)
        return (*lead, rows, columns)


def _length(span: Span) -> int:
    return span[1] - span[0]


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
        """Return the build of a part of the targets ``[…, O, I]``.

        Of per-expert sources only the restricted experts remain; of other sources ``region``
        is read. Packed words are cut between groups only; for other columns the targets become
        floats.
        """
        if self.held is not None and any(n % self.held.group for n in to.columns or ()):
            return replace(self, held=None).restricted(to)
        stack = next((op for op in self.ops if isinstance(op, StackExperts)), None)
        if stack is None or to.experts is None:
            return replace(self, restriction=to)
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
                case SplitGateUp():
                    rows = None
                case Dequantize():
                    rows = _widened(rows, op.rows_per_part)
                    columns = _widened(columns, op.columns_per_part)
                case StackExperts():
                    experts = None
                case _:
                    return Restriction()
        return Restriction(experts, rows, columns)

    def bytes_read(self, tensors: Mapping[str, TensorInfo]) -> int:
        """Return the bytes of the sources' regions that are read."""
        region = self.region
        if region == Restriction():
            return sum(nbytes(tensors[name].dtype, tensors[name].shape) for name in self.sources)
        stored = tensors[self.weights[0]].shape
        whole = stored if self.dequantize is None else self.dequantize.logical(stored)
        share = math.prod(_clipped(region, whole).shape(whole)) / math.prod(whole)
        read = 0
        for name in self.weights:
            read += math.ceil(nbytes(tensors[name].dtype, stored) * share)
        for _, names in self.parts:
            for name in names:
                info = tensors[name]
                follows = len(info.shape) == len(stored) and math.prod(info.shape) > 1
                size = nbytes(info.dtype, info.shape)
                read += math.ceil(size * share) if follows else size
        return read


def _clipped(region: Restriction, whole: tuple[int, ...]) -> Restriction:
    def clip(span: Span | None, size: int) -> Span | None:
        return None if span is None else (span[0], min(span[1], size))

    return Restriction(
        region.experts, clip(region.rows, whole[-2]), clip(region.columns, whole[-1])
    )


def _widened(span: Span | None, block: int) -> Span | None:
    """Return the span of whole blocks; the last block may end beyond the tensor."""
    return None if span is None else (span[0] // block * block, -(-span[1] // block) * block)


def _specs(names: tuple[str, ...], tensors: Mapping[str, TensorInfo]) -> tuple[Spec, ...]:
    """Describe the sources of one build; the checks have ensured that they are equal."""
    return tuple(Spec(tensors[n].dtype, tensors[n].shape) for n in names[:1]) * len(names)
