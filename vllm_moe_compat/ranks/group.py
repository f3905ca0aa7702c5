"""What cutting needs to know of a group of ranks: which one this is, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Group(Protocol):
    """A group of ranks; ``mx.distributed.Group`` is one."""

    def rank(self) -> int:
        """Return this rank's number, from 0."""

    def size(self) -> int:
        """Return the number of ranks."""


@dataclass(frozen=True, slots=True)
class RankOf:
    """A rank without the others: a model can be cut for it, and not computed.

    Attributes:
        number: the rank's number, from 0.
        count: the number of ranks.
    """

    number: int
    count: int

    def rank(self) -> int:
        """Return this rank's number."""
        return self.number

    def size(self) -> int:
        """Return the number of ranks."""
        return self.count
