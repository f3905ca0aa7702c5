"""Operands and operations: the vocabulary in which plans are written.

An operation takes an ``Operand`` and gives one. It knows what it does to shapes and
dtypes (``result``) and the operation that undoes it (``inverse``); ``execute`` knows how
to carry it out. Operations that move values are in ``plan/ops``; those that belong to a
stored number form are in that form's file.
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
    """Weights, with the further tensors of each while they are quantised.

    Attributes:
        weights: the tensors that hold the weights' numbers.
        parts: role (``scale``, ``scales``, ``biases``, …) → one tensor for each weight.
    """

    weights: tuple[Spec, ...]
    parts: Mapping[str, tuple[Spec, ...]] = field(default_factory=dict)


class Op(ABC):
    """One operation of a plan; a frozen dataclass."""

    __slots__ = ()

    @abstractmethod
    def result(self, given: Operand, target: str) -> Operand:
        """Return what the operation makes of ``given``.

        Args:
            given: its operand.
            target: safetensors' name of the dtype that dequantised weights get.

        Raises:
            ValueError: the operation does not apply to this operand.
        """

    @abstractmethod
    def inverse(self) -> Op:
        """Return the operation that undoes this one."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The operation for people: ``stack 256 experts``."""


class Dequantize(Op):
    """An operation that turns a stored number form into floats ``[…, O, I]``.

    The shape stays and the parts go. Each part may also be moved together with its weight,
    without being multiplied: then every layout operation applies to both.
    """

    __slots__ = ()

    @abstractmethod
    def parts_follow(self, weight: Spec, parts: Mapping[str, Spec]) -> bool:
        """Whether layout operations on the weight have a counterpart on its parts."""

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
