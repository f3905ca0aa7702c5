"""The operation that dequantises integers with a scale and a zero point per group.

Every published integer form has one rule: ``(q - zero)·scale``, with a scale and a zero point
for each row and each group of its columns. Forms differ in how the integers are stored, and
the operation says how. Axes: ``O`` output rows, ``I`` input columns, ``b`` bits, ``G`` groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_moe_compat.checkpoint.operations import (
    AFFINE,
    AFFINE_BITS,
    AFFINE_GROUPS,
    Dequantize,
    MlxFormat,
    Operand,
    Spec,
)
from vllm_moe_compat.dtypes import FLOATS

SCALE, ZERO, ORDER, SHAPE = "scale", "zero", "order", "shape"
"""Roles of parts: scales, zero points, the group of each column, the shape of the floats."""

ROW_WORDS, BYTES, COLUMN_WORDS, AWQ_WORDS = "row words", "bytes", "column words", "AWQ words"
"""Storages. ``ROW_WORDS``: int32 ``[O, I·b/32]``, low bits first, scales ``[O, G]``, zero points
``[O·b/32, G]``. ``BYTES``: int8 ``[O, I]``, scales and zero points ``[O, G]``. ``COLUMN_WORDS``
(GPTQ): int32 ``[I·b/32, O]``, scales ``[G, O]``, zero points ``[G, O·b/32]``. ``AWQ_WORDS``: int32
``[I, O/8]`` with nibbles in the order 0 2 4 6 1 3 5 7, scales ``[G, O]``, zero points
``[G, O/8]``."""

_ALL = 2**30


@dataclass(frozen=True, slots=True)
class DequantizeInts(Dequantize):
    """Integers become ``(q - zero)·scale``, computed in float32 and rounded once.

    MLX holds them as ``affine``: ``q·scale + bias`` with the bias ``-zero·scale``. Scales and
    biases keep the stored dtype where the zero point is the middle, ``2^(b-1)``, of all groups:
    then every bias is exact in it. With other zero points a bias has more digits than
    a half-precision number, so both are float32.

    Attributes:
        storage: how integers and parts are stored.
        bits: bits of an integer.
        columns: ``I``.
        group: consecutive columns under one scale; ``I`` for one scale per row.
        name: the form in messages: ``GPTQ int4``.
        scales: dtype of the scales (safetensors' name).
        symmetric: whether all zero points are ``2^(b-1)``; stored ones are checked.
        minus_one: whether zero points are stored less 1, modulo ``2^b``.
        act_order: whether a part names the group of each column. If not, such a part must name
            consecutive groups.
    """

    storage: str
    bits: int
    columns: int
    group: int
    name: str
    scales: str
    symmetric: bool = True
    minus_one: bool = False
    act_order: bool = False

    @property
    def held(self) -> MlxFormat | None:
        """Affine, in the largest of MLX's groups that fits into the groups and the row.

        A row of one group, or a group that is a multiple, has its scale repeated. None in act
        order, and where no group of MLX fits.
        """
        if self.act_order or self.bits not in AFFINE_BITS:
            return None
        per_row = self.group >= self.columns
        for group in AFFINE_GROUPS:
            if self.columns % group == 0 and (per_row or self.group % group == 0):
                exact = self.symmetric and self.scales in FLOATS
                return MlxFormat(AFFINE, self.bits, group, self.scales if exact else "F32")
        return None

    def logical(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``[…, O, I]``."""
        *lead, height, width = stored
        if self.storage == COLUMN_WORDS:
            return (*lead, width, self.columns)
        if self.storage == AWQ_WORDS:
            return (*lead, width * 32 // self.bits, self.columns)
        return (*lead, height, self.columns)

    @property
    def exchanged(self) -> bool:
        """Whether words and parts lie along the rows."""
        return self.storage in (COLUMN_WORDS, AWQ_WORDS)

    @property
    def groups(self) -> int:
        """``G``."""
        return -(-self.columns // self.group)

    def result(self, given: Operand, target: str) -> Operand:
        """Drop the parts; the dtype becomes ``target``."""
        (weight,) = given.weights
        stored = "I8" if self.storage == BYTES else "I32"
        if weight.dtype != stored or SCALE not in given.parts or len(weight.shape) < 2:
            raise ValueError(f"{weight} is not {self.name}")
        return Operand((Spec(target, self.logical(weight.shape)),))

    @property
    def words(self) -> str:
        """``dequantise GPTQ int4 with scales per 16``."""
        per = "row" if self.group >= self.columns else str(self.group)
        order = ", in act order" if self.act_order else ""
        return f"dequantise {self.name} with scales per {per}{order}"

    def parts_follow(self, weight: Spec, parts: Mapping[str, Spec]) -> bool:
        """No: a word holds several columns or rows."""
        return False

    def transposed(self) -> DequantizeInts:
        """Return the operation itself, as its words cannot be transposed."""
        return self

    @property
    def rows_per_part(self) -> int:
        """Rows whose zero points fill whole words."""
        return 32

    @property
    def columns_per_part(self) -> int:
        """All columns: rows of words are not cut."""
        return _ALL
