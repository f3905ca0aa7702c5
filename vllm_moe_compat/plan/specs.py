"""What an operation of a plan takes and gives: dtypes and shapes, no values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spec:
    """The dtype (safetensors' name) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """What goes into an operation and comes out of it."""

    weights: tuple[Spec, ...]
    scales: tuple[Spec, ...] = ()
    biases: tuple[Spec, ...] = ()
