"""What carrying out a number form's operations has to answer.

Weights come as ``[N, O, I]``, the leading axes flattened to ``N``, a few experts or a band
of rows at a time; parts come once, for all of them.
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
    """Carries out one form's dequantising operation and its inverse."""

    @abstractmethod
    def ready(self, op: Any, parts: Parts, shape: tuple[int, int, int]) -> Parts:
        """Return the parts of a weight ``[N, O, I]``, brought to one shape and dtype."""

    @abstractmethod
    def floats(
        self, op: Any, weight: mx.array, parts: Parts, experts: slice, rows: slice, dtype: str
    ) -> mx.array:
        """Return a band as floats; lazy.

        Args:
            op: the dequantising operation.
            weight: ``[n, o, I]``: rows ``rows`` of the experts ``experts``.
            parts: as ``ready`` has made them, of the whole weight.
            experts: which of ``N``.
            rows: which of ``O``; begins at a multiple of ``op.rows_per_part``.
            dtype: of the result.
        """

    def fill(
        self, op: Any, weight: Stack, parts: Parts, dtype: str, targets: int
    ) -> list[mx.array] | None:
        """Dequantise experts ``[E, k·O, I]`` into ``k`` tensors ``[E, O, I]`` by a faster way.

        Returns:
            None where there is none; ``weight`` is untouched then.
        """
        return None

    @abstractmethod
    def restrict(
        self, op: Dequantize, parts: Parts, shape: tuple[int, ...], region: Restriction
    ) -> dict[str, mx.array]:
        """Return the parts of a region of the weight ``shape``, made of whole blocks."""

    @abstractmethod
    def quantize(self, op: Op, given: Arrays) -> Arrays:
        """Carry out the inverse: floats ``[…, O, I]`` to the stored form."""
