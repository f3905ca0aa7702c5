"""Operands, MLX's packed formats, and operations: the vocabulary of plans.

An operation turns one ``Operand`` into another. It defines its effect on shapes and dtypes
(``result``), and, where a rewrite needs it, the operation that undoes it; ``execute`` runs it.
Operations that move values are in ``plan/ops``, those of a stored number form in that form's
file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Spec:
    """The dtype (safetensors' name) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """Weights, with their further tensors while they are in a stored number form.

    Attributes:
        weights: the tensors with the weights' numbers.
        parts: role (``scale``, ``scales``, ``biases``, …) → one tensor for each weight.
    """

    weights: tuple[Spec, ...]
    parts: Mapping[str, tuple[Spec, ...]] = field(default_factory=dict)


AFFINE = "affine"
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (128, 64, 32)
"""Groups of mode ``affine``, the largest first."""


@dataclass(frozen=True, slots=True)
class MlxFormat:
    """A packed format of MLX in which a stored weight is held without rounding.

    A weight ``[…, O, I]`` is ``uint32 […, O, I·bits/32]``, low bits first, and scales
    ``[…, O, I/group]``. In mode ``affine`` a value is ``q·scale + bias``, with biases like the
    scales. In the other modes scales are bytes, and ``nvfp4`` may have one float32 factor for
    each matrix.

    Attributes:
        mode: ``affine``, ``nvfp4``, ``mxfp4`` or ``mxfp8``.
        bits: bits of a value.
        group: columns under one scale.
        scales: dtype of the scales (safetensors' name); ``U8`` except in mode ``affine``.
        global_scale: whether each matrix has one float32 scale more, which only expert layers
            take.
    """

    mode: str
    bits: int
    group: int
    scales: str
    global_scale: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the rows of a float shape are whole groups."""
        return len(shape) > 1 and shape[-1] % self.group == 0

    def tensors(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        """Return parameter of the module → tensor, for a weight of float shape ``[…, O, I]``."""
        *lead, columns = shape
        scales = Spec(self.scales, (*lead, columns // self.group))
        found = {"weight": Spec("U32", (*lead, columns * self.bits // 32)), "scales": scales}
        if self.mode == AFFINE:
            found["biases"] = scales
        if self.global_scale:
            found["global_scale"] = Spec("F32", tuple(shape[:-2]))
        return found

    @property
    def config(self) -> dict[str, int | str]:
        """The entry of mlx-lm's ``config["quantization"]`` for the format."""
        found: dict[str, int | str] = {
            "group_size": self.group,
            "bits": self.bits,
            "mode": self.mode,
        }
        return found | ({"global_scale": True} if self.global_scale else {})

    def __str__(self) -> str:
        return f"affine {self.bits}-bit g{self.group}" if self.mode == AFFINE else self.mode


class Op(ABC):
    """One operation of a plan; a frozen dataclass."""

    __slots__ = ()

    @abstractmethod
    def result(self, given: Operand, target: str) -> Operand:
        """Return the dtypes and shapes of the operation's result.

        Args:
            given: the operand.
            target: dtype of dequantised weights (safetensors' name).

        Raises:
            ValueError: the operation does not apply to this operand.
        """

    @property
    @abstractmethod
    def words(self) -> str:
        """The operation in a message: ``stack 256 experts``."""


class Invertible(Op):
    """An operation that a rewrite can undo."""

    __slots__ = ()

    @abstractmethod
    def inverse(self) -> Invertible:
        """Return the operation that undoes this one."""


class Dequantize(Op):
    """An operation that turns a stored number form into floats ``[…, O, I]``.

    The parts are dropped. Alternatively a weight stays in its form and moves together with its
    parts; then every operation that moves values applies to both. Or MLX holds it in a packed
    format of its own (``held``), into which the form's executor turns it without rounding.
    """

    __slots__ = ()

    @property
    def held(self) -> MlxFormat | None:
        """The format in which MLX holds the weight bit for bit; None if it holds only floats."""
        return None

    def logical(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape ``[…, O, I]`` of the floats, for the shape of the stored tensor."""
        return stored

    @property
    def exchanged(self) -> bool:
        """Whether the last two axes of stored tensors are columns and rows."""
        return False

    @abstractmethod
    def parts_follow(self, weight: Spec, parts: Mapping[str, Spec]) -> bool:
        """Whether operations that move values apply to the parts as to the weight."""

    @abstractmethod
    def transposed(self) -> Dequantize:
        """Return the operation for the transposed weight."""

    @property
    @abstractmethod
    def rows_per_part(self) -> int:
        """Rows of the weight under one row of its parts."""

    @property
    @abstractmethod
    def columns_per_part(self) -> int:
        """Columns of the weight under one column of its parts."""
