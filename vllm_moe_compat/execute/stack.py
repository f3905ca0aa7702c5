"""Weights with their parts as arrays, and a stack of experts that is not a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from vllm_moe_compat.execute.stored_tensors import Source, as_array

TEMPORARY_BYTES = 16 * 2**20
"""Limit for the float32 intermediates of one band, in bytes."""


class Stack:
    """``E`` arrays of equal shape that stand for one ``[E, …]`` without being copied.

    Members that are stored tensors are read when they are taken.
    """

    def __init__(self, members: list[Source]) -> None:
        self._members: list[Any] = list(members)
        self.shape = (len(members), *members[0].shape)

    def all(self) -> mx.array:
        """Return the whole stack as one array and release the members."""
        return self.take(0, self.shape[0])

    def pop(self, expert: int) -> mx.array:
        """Return one member and release it."""
        member, self._members[expert] = self._members[expert], None
        return as_array(member)

    def take(self, start: int, stop: int, after: Sequence[mx.array] = ()) -> mx.array:
        """Return ``[start:stop]`` as an array, made after ``after``; release those members."""
        members = [as_array(member) for member in self._members[start:stop]]
        chunk = mx.stack(mx.depends(members, list(after)) if after else members)
        self._members[start:stop] = [None] * (stop - start)
        return chunk


@dataclass(slots=True)
class Arrays:
    """The arrays of an ``Operand``; a weight may be a ``Stack`` or a ``StoredTensor``."""

    weights: list[Any]
    parts: dict[str, list[Any]] = field(default_factory=dict)

    def only(self) -> dict[str, mx.array]:
        """Return the parts of a single weight, by role."""
        return {role: arrays[0] for role, arrays in self.parts.items()}


def as_whole(weight: Any) -> mx.array:
    """Return a weight as one array; a stack is taken, a stored tensor read."""
    return weight.all() if isinstance(weight, Stack) else as_array(weight)
