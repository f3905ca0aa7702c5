"""The interface that runs a stored number form's operations on MLX arrays.

Weights arrive as ``[N, O, I]``, their leading axes flattened to ``N``, a few experts or a band
of rows at a time. Parts arrive once, for all of ``N``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

from vllm_moe_compat.checkpoint.operations import Dequantize, Op
from vllm_moe_compat.execute.fp8_tables import Bits
from vllm_moe_compat.execute.stack import Arrays, Stack
from vllm_moe_compat.execute.stored_tensors import Source, StoredTensor
from vllm_moe_compat.plan.build import Restriction

Parts = Mapping[str, mx.array]
Writer: TypeAlias = Callable[[int, Bits, Bits], None]
"""Takes the first row, the rows' stored bytes ``[r, I]``, and the memory ``[r, I]`` for the floats,
as unsigned integers of its width."""


class HeldPart(NamedTuple):
    """A stored tensor and the parameter of a module that it becomes.

    Attributes:
        kind: ``weight``, ``scales``, ``biases`` or ``global_scale``; empty for a mere check.
        tensor: the stored tensor.
        convert: makes the parameter of the tensor's bytes, uint8 ``[nbytes]``, without MLX; gate
            before up, or one value for both. None if the bytes are the parameter's.
    """

    kind: str
    tensor: StoredTensor
    convert: Callable[[Bits], Bits] | None = None


class Executor(ABC):
    """Runs one form's dequantising operation and its inverse.

    ``ready`` is called once for each tensor that is made, ``cut`` and then ``floats`` or ``packed``
    for each band of rows.
    """

    @abstractmethod
    def ready(self, op: Any, parts: Parts, shape: tuple[int, int, int]) -> Parts:
        """Return the parts of a weight in the shape and dtype of ``floats`` and ``packed``.

        Args:
            op: the dequantising operation.
            parts: the parts as stored, for all of ``N``.
            shape: ``[N, …, …]`` of the tensor as it is stored.

        Raises:
            LayoutError: the parts' values contradict the operation.
        """

    def cut(self, op: Any, weight: mx.array, rows: slice) -> mx.array:
        """Return the rows ``rows`` of stored tensors ``[n, …, …]``; lazy."""
        return weight[:, rows]

    @abstractmethod
    def floats(
        self, op: Any, weight: mx.array, parts: Parts, experts: slice, rows: slice, dtype: str
    ) -> mx.array:
        """Return a band as floats; lazy.

        Args:
            op: the dequantising operation.
            weight: the result of ``cut``: rows ``rows`` of experts ``experts``.
            parts: the result of ``ready`` for the whole weight.
            experts: slice of ``N``.
            rows: slice of ``O``; starts at a multiple of ``op.rows_per_part``.
            dtype: dtype of the result.
        """

    def packed(
        self, op: Any, weight: mx.array, parts: Parts, experts: slice, rows: slice
    ) -> tuple[mx.array, ...]:
        """Return a band in the format ``op.held``; lazy. Arguments are those of ``floats``.

        Returns:
            Words ``uint32 [n, o, I·bits/32]``, scales ``[n, o, I/group]`` and, in mode ``affine``,
            biases like the scales.
        """
        raise NotImplementedError(f"{type(op).__name__} holds nothing")

    def global_scale(self, op: Any, parts: Parts) -> mx.array:
        """Return the float32 scale of each matrix, where ``op.held`` has one.

        Returns:
            ``[N]``, or ``[N, 2]`` with one each for the gate and the up of combined experts.
        """
        raise NotImplementedError(f"{type(op).__name__} has no global scale")

    def region(self, op: Any, weight: Source, region: Restriction) -> Source:
        """Return the region of a tensor, given in rows and columns of the floats; reads nothing."""
        if region.experts is not None:
            weight = weight[slice(*region.experts)]
        if region.rows is not None:
            weight = weight[..., slice(*region.rows), :]
        return weight if region.columns is None else weight[..., slice(*region.columns)]

    def fill(
        self, op: Any, weight: Stack, parts: Parts, dtype: str, targets: int
    ) -> list[mx.array] | None:
        """Dequantise experts ``[E, k·O, I]`` into ``k`` tensors ``[E, O, I]`` by a faster path.

        Returns:
            The tensors; None, with ``weight`` untouched, if there is no faster path.
        """
        return None

    def writes(self, op: Any, rows: int, columns: int, dtype: str, held: mx.Dtype) -> bool:
        """Whether ``writer`` makes one matrix ``[O, I]`` of floats by a faster path.

        Args:
            op: the dequantising operation.
            rows: ``O``.
            columns: ``I``.
            dtype: dtype that values are rounded to.
            held: dtype of the memory that they are written to.
        """
        return False

    def writer(
        self,
        op: Any,
        shape: tuple[int, int],
        parts: Mapping[str, tuple[Bits, str]],
        dtype: str,
    ) -> Writer:
        """Return a function that writes rows of one matrix, where ``writes`` says so.

        Any thread may use it, so MLX computes nothing here.

        Args:
            op: the dequantising operation.
            shape: ``[O, I]``, as stored in bytes.
            parts: role → its stored bytes, uint8 ``[nbytes]``, and dtype (safetensors' name).
            dtype: dtype that values are rounded to.
        """
        raise NotImplementedError(f"{type(op).__name__} has no faster path")

    def holds_bytes(self, op: Any, roles: Collection[str]) -> bool:
        """Whether words of ``op.held`` are the stored bytes, row by row.

        Args:
            op: the dequantising operation.
            roles: the parts that the weight has.
        """
        return False

    def held_parts(self, op: Any, operand: Arrays) -> list[HeldPart]:
        """Return the tensors of one matrix, or of gate and up, where ``holds_bytes`` says so.

        Args:
            op: the dequantising operation.
            operand: the stored tensors of one expert, unread.
        """
        raise NotImplementedError(f"{type(op).__name__} changes bytes")

    @abstractmethod
    def restrict(
        self,
        op: Dequantize,
        parts: Mapping[str, Source],
        shape: tuple[int, ...],
        region: Restriction,
    ) -> dict[str, Source]:
        """Return the parts for a region of whole blocks of a weight of ``shape`` as stored."""

    @abstractmethod
    def quantize(self, op: Op, given: Arrays) -> Arrays:
        """Run the inverse: floats ``[…, O, I]`` to the stored form."""
