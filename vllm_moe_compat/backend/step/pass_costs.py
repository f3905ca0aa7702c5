"""What passes cost by rows and width, measured while serving.

A pass of ``rows`` requests computes ``width`` tokens of each: 1, or 1 + drafts. Costs are compared
as multiples of the pass of width 1 with as many rows, so both have to be measured now and then:
contexts grow, and the machine has other work.

An estimate is the lower median of the last few measurements, since the first pass of a shape
compiles, and any may be interrupted. Three measurements in a row that are far off in the same
direction replace those before them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

KEPT = 7  # measurements of a pass
ENOUGH = 2  # measurements for an estimate
FAR_OFF, NEW_ESTIMATE = 1.5, 3
# Up to this many rows each number has costs of its own; further ones share them in groups.
ALONE, GROUPED = 8, 1.25
# Passes of several tokens per row after which one of a single token is measured again.
RENEWED = 32


def group_of(rows: int) -> int:
    """Return the number of the group of row counts that share their costs."""
    return rows if rows <= ALONE else ALONE + math.ceil(math.log(rows / ALONE, GROUPED))


@dataclass(slots=True)
class _Cost:
    """Seconds of one kind of pass."""

    last: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    # How many of the last measurements were far off, in a row; negative if they were below.
    off: int = 0

    @property
    def is_known(self) -> bool:
        return len(self.last) >= ENOUGH

    @property
    def seconds(self) -> float:
        return sorted(self.last)[(len(self.last) - 1) // 2]

    def add(self, seconds: float) -> None:
        side = 0
        if self.is_known:
            side = (seconds > self.seconds * FAR_OFF) - (seconds < self.seconds / FAR_OFF)
        self.off = self.off + side if side and self.off * side >= 0 else side
        self.last.append(seconds)
        if abs(self.off) == NEW_ESTIMATE:
            newest = list(self.last)[-NEW_ESTIMATE:]
            self.last.clear()
            self.last.extend(newest)
            self.off = 0


@dataclass(slots=True)
class _Group:
    """Passes with about the same number of rows."""

    by_width: dict[int, _Cost] = field(default_factory=dict)
    since_plain: int = 0  # passes since one of width 1

    def known(self) -> list[tuple[int, float]]:
        return sorted((w, cost.seconds) for w, cost in self.by_width.items() if cost.is_known)


class PassCosts:
    """Seconds of passes by rows and width."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}

    def add(self, rows: int, width: int, seconds: float) -> None:
        """Take note of a pass."""
        group = self._groups.setdefault(group_of(rows), _Group())
        group.by_width.setdefault(width, _Cost()).add(seconds)
        group.since_plain = 0 if width == 1 else group.since_plain + 1

    def seconds_of_one_token(self, rows: int) -> float:
        """Return the seconds of a pass of one token per row; 0 where they are not known."""
        plain = self._plain(rows)
        return plain.seconds if plain is not None and plain.is_known else 0.0

    def needs_one_token(self, rows: int) -> bool:
        """Return whether a pass of one token per row has to be measured."""
        plain = self._plain(rows)
        if plain is None or not plain.is_known or plain.off:
            return True
        return self._groups[group_of(rows)].since_plain >= RENEWED

    def relative(self, rows: int, widths: Sequence[int]) -> list[float]:
        """Return the costs of passes, as multiples of the one of width 1 and as many rows.

        Between measured widths, and beyond them, they are interpolated. Without a measurement
        they are those of fewer rows, which are lower bounds; empty without those, too.
        """
        numbers = [n for n in self._groups if n <= group_of(rows)]
        for number in sorted(numbers, reverse=True):
            points = self._groups[number].known()
            if len(points) > 1 and points[0][0] == 1:
                plain = points[0][1]
                return [max(1.0, _interpolated(points, width) / plain) for width in widths]
        return []

    def _plain(self, rows: int) -> _Cost | None:
        group = self._groups.get(group_of(rows))
        return group.by_width.get(1) if group is not None else None


def _interpolated(points: list[tuple[int, float]], width: int) -> float:
    """Return the value at ``width`` of the line through the nearest two of the sorted points."""
    after = next((i for i, (known, _) in enumerate(points) if known >= width), len(points) - 1)
    (left, low), (right, high) = points[max(after - 1, 0)], points[max(after, 1)]
    return low + (high - low) * (width - left) / (right - left)
