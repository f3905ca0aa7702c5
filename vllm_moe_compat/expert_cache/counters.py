"""Counters of cached experts, per layer, since the process started.

A *use* is one expert in one layer and pass, however many tokens chose it. A layer that holds all
of its experts does not read the router's choice, so it counts nothing but what it read at first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias


@dataclass(slots=True)
class Counters:
    """Counts of one layer, or of all.

    Attributes:
        hits: uses of experts that were in memory.
        misses: uses of experts that had to be read.
        failures: those of them that could not be read.
        bytes_read: bytes of the experts that were read, as held.
        seconds_waited: wall time of reading, with the arithmetic that it takes.
        passes: times that the router's choice was read back.
        groups: groups of experts that these passes took; more than passes where a pass wanted
            more experts than fit.
    """

    hits: int = 0
    misses: int = 0
    failures: int = 0
    bytes_read: int = 0
    seconds_waited: float = 0.0
    passes: int = 0
    groups: int = 0

    def __add__(self, other: Counters) -> Counters:
        """Return the sums."""
        return _each(operator.add, self, other)

    def __sub__(self, other: Counters) -> Counters:
        """Return what was counted after ``other``."""
        return _each(operator.sub, self, other)


Snapshot: TypeAlias = dict[str, Counters]
"""Layer → its counts."""

_layers: Snapshot = {}


def counters_of(layer: str) -> Counters:
    """Return the counts of a layer, to be added to; containers of one name share them."""
    return _layers.setdefault(layer, Counters())


def layers() -> Snapshot:
    """Return a copy of all layers' counts."""
    return {name: counts + Counters() for name, counts in list(_layers.items())}


def counters() -> Counters:
    """Return the sums over all layers."""
    return sum(layers().values(), start=Counters())


def _each(combine: Callable[[Any, Any], Any], a: Counters, b: Counters) -> Counters:
    names = [field.name for field in fields(Counters)]
    return Counters(**{name: combine(getattr(a, name), getattr(b, name)) for name in names})
