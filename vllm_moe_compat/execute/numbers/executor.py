"""The interface that runs a stored number form's operations on MLX arrays.

Weights arrive as ``[N, O, I]``, their leading axes flattened to ``N``, a few experts or a band
of rows at a time. Parts arrive once, for all of ``N``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.operations import Dequantize, Op
from vllm_moe_compat.execute.stack import Arrays, Stack
from vllm_moe_compat.plan.build import Restriction

Parts = Mapping[str, mx.array]


class Executor(ABC):
    """Runs one form's dequantising operation and its inverse."""

    @abstractmethod
    def ready(self, op: Any, parts: Parts, shape: tuple[int, int, int]) -> Parts:
        """Return the parts of a weight ``[N, O, I]`` in the shape and dtype of ``floats``."""

    @abstractmethod
    def floats(
        self, op: Any, weight: mx.array, parts: Parts, experts: slice, rows: slice, dtype: str
    ) -> mx.array:
        """Return a band as floats; lazy.

        Args:
            op: the dequantising operation.
            weight: ``[n, o, I]``: rows ``rows`` of experts ``experts``.
            parts: the result of ``ready`` for the whole weight.
            experts: slice of ``N``.
            rows: slice of ``O``; starts at a multiple of ``op.rows_per_part``.
            dtype: dtype of the result.
        """

    def fill(
        self, op: Any, weight: Stack, parts: Parts, dtype: str, targets: int
    ) -> list[mx.array] | None:
        """Dequantise experts ``[E, k·O, I]`` into ``k`` tensors ``[E, O, I]`` by a faster path.

        Returns:
            The tensors; None, with ``weight`` untouched, if there is no faster path.
        """
        return None

    @abstractmethod
    def restrict(
        self, op: Dequantize, parts: Parts, shape: tuple[int, ...], region: Restriction
    ) -> dict[str, mx.array]:
        """Return the parts for a region of whole blocks of a weight of ``shape``."""

    @abstractmethod
    def quantize(self, op: Op, given: Arrays) -> Arrays:
        """Run the inverse: floats ``[…, O, I]`` to the stored form."""
