"""Operands and operations: the vocabulary of plans.

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

    The shape stays and the parts are dropped. Alternatively a weight stays in its form and
    moves together with its parts; then every operation that moves values applies to both.
    """

    __slots__ = ()

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
