"""The operation that dequantises FP4.

Axes: ``O`` output rows, ``I`` input columns of a projection, ``g`` columns under one scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_moe_compat.checkpoint.operations import Dequantize, MlxFormat, Operand, Spec

SCALE, GLOBAL = "scale", "global scale"
"""Roles of the parts of an FP4 weight: one scale per group, and one for a matrix."""
NVFP4, MXFP4 = "nvfp4", "mxfp4"
GROUPS = {NVFP4: 16, MXFP4: 32}
"""Mode → columns under one scale."""


@dataclass(frozen=True, slots=True)
class DequantizeFp4(Dequantize):
    """E2M1 pairs ``[…, O, I/2]`` times their scales, in the target dtype.

    A byte holds two columns, the first in the low nibble. A scale ``[…, O, I/g]`` is one byte:
    E4M3 in mode ``nvfp4``, the exponent of a power of two (E8M0) in mode ``mxfp4``. A global
    scale is a float for each matrix. The product is formed in float32, where that of value and
    scale is exact, and rounded once.

    Attributes:
        mode: ``nvfp4`` or ``mxfp4``.
        shared: whether there is a global scale.
        divides: whether the global scale divides; else it multiplies.
        turned: whether bytes and scales are stored with their last two axes exchanged,
            ``[…, I/2, O]`` and ``[…, I/g, O]``.
    """

    mode: str
    shared: bool = False
    divides: bool = False
    turned: bool = False

    @property
    def group(self) -> int:
        """Columns under one scale."""
        return GROUPS[self.mode]

    @property
    def held(self) -> MlxFormat:
        """MLX's format of the same name: the bytes stay as they are."""
        return MlxFormat(self.mode, 4, self.group, "U8", self.shared)

    def logical(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``[…, O, I]`` for the shape of the bytes."""
        return unpacked(stored, turned=self.turned)

    @property
    def exchanged(self) -> bool:
        """Whether bytes and scales are turned."""
        return self.turned

    def result(self, given: Operand, target: str) -> Operand:
        """Drop the scales; two columns per byte; the dtype becomes ``target``."""
        (weight,), (scale,) = given.weights, given.parts.get(SCALE, (Spec("", ()),))
        *lead, columns = self.logical(weight.shape)
        grid: tuple[int, ...] = (*lead, columns // self.group)
        if self.turned:
            grid = (*lead[:-1], grid[-1], lead[-1])
        if weight.dtype not in ("U8", "I8") or columns % self.group or scale.shape != grid:
            raise ValueError(f"{scale} does not scale {weight} in groups of {self.group}")
        if self.shared != (GLOBAL in given.parts):
            raise ValueError(f"{weight} has a global scale, or lacks one")
        return Operand((Spec(target, (*lead, columns)),))

    @property
    def words(self) -> str:
        """``dequantise NVFP4``."""
        return f"dequantise {self.mode.upper()}"

    def parts_follow(self, weight: Spec, parts: Mapping[str, Spec]) -> bool:
        """Two columns share a byte, so no operation moves weight and scales alike."""
        return False

    def transposed(self) -> DequantizeFp4:
        """Bytes along rows cannot be read along columns.

        Raises:
            ValueError: always.
        """
        raise ValueError("FP4 is packed along its columns and cannot be transposed in its form")

    @property
    def rows_per_part(self) -> int:
        """Rows under one scale."""
        return 1

    @property
    def columns_per_part(self) -> int:
        """Columns under one scale."""
        return self.group


def unpacked(stored: tuple[int, ...], *, turned: bool) -> tuple[int, ...]:
    """Return ``[…, O, I]`` for bytes ``[…, O, I/2]``, or ``[…, I/2, O]`` if ``turned``."""
    *lead, rows, columns = (1, *stored) if len(stored) < 2 else stored
    return (*lead, columns, 2 * rows) if turned else (*lead, rows, 2 * columns)


def matrices(shape: tuple[int, ...]) -> int:
    """Return the number of matrices in ``[…, O, I]``."""
    return math.prod(shape[:-2])
