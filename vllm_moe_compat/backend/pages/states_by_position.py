"""States after every token of one pass, of which one per row is kept.

A pass that verifies drafts reads more tokens of a row than will be accepted, and the row's state
has to end up as after the accepted ones. So the pass leaves each array of a state in one of two
forms, neither of which copies anything while the pass runs: a recurrent state as one array per
token, and the tail of a convolution as a window that slides over the convolution's input.
``StatePool.put_positions`` gathers what is kept and ``StatePool.save_positions`` writes pages.

These objects hold the states of all tokens; they are dropped once the states are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """An array of a state that is computed anew for each token.

    Attributes:
        arrays: ``T`` arrays ``[B, *shape]``, after one token, two, … T.
    """

    arrays: tuple[mx.array, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens T."""
        return len(self.arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after one token, rows first."""
        return tuple(self.arrays[0].shape)

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the array."""
        return self.arrays[0].dtype

    def held(self) -> list[mx.array]:
        """Return the arrays that the states are gathered from."""
        return list(self.arrays)

    def after(self, rows: Sequence[int], counts: Sequence[int]) -> mx.array:
        """Return ``[len(rows), *shape]`` after ``counts[i]`` tokens of row ``rows[i]``."""
        by_count: dict[int, list[int]] = {}
        for place, count in enumerate(counts):
            by_count.setdefault(count, []).append(place)
        if len(by_count) == 1 and list(rows) == list(range(self.shape[0])):
            return self.arrays[counts[0] - 1]
        parts = [
            self.arrays[count - 1][_index([rows[place] for place in places])]
            for count, places in by_count.items()
        ]
        order = [place for places in by_count.values() for place in places]
        joined = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        return joined if order == sorted(order) else joined[_index(np.argsort(order).tolist())]


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """An array of a state that holds the last ``keep`` places of a growing sequence.

    Attributes:
        sequence: ``[B, …, keep + T, …]``: what the state held before the pass, then the pass's
            own; after ``t`` tokens the state is ``keep`` places from place ``t`` on.
        keep: places in the state.
        axis: of ``sequence``, that the window slides along; positive.
    """

    sequence: mx.array
    keep: int
    axis: int = 1

    @property
    def tokens(self) -> int:
        """The number of tokens T."""
        return int(self.sequence.shape[self.axis]) - self.keep

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after one token, rows first."""
        whole = self.sequence.shape
        return (*whole[: self.axis], self.keep, *whole[self.axis + 1 :])

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the array."""
        return self.sequence.dtype

    def held(self) -> list[mx.array]:
        """Return the arrays that the states are gathered from."""
        return [self.sequence]

    def after(self, rows: Sequence[int], counts: Sequence[int]) -> mx.array:
        """Return ``[len(rows), *shape]`` after ``counts[i]`` tokens of row ``rows[i]``."""
        places = np.asarray(counts, dtype=np.uint32)[:, None] + np.arange(
            self.keep, dtype=np.uint32
        )
        shape = [len(rows)] + [1] * (self.sequence.ndim - 1)
        shape[self.axis] = self.keep
        index = mx.array(places.reshape(shape))
        return mx.take_along_axis(self.sequence[_index(rows)], index, axis=self.axis)


@dataclass(frozen=True, slots=True, eq=False)
class StatesByPosition:
    """The states of one layer after each token of a pass of ``B`` rows and ``T`` tokens.

    Attributes:
        parts: one per array of the state.
    """

    parts: tuple[Steps | Window, ...]

    @property
    def held(self) -> list[mx.array]:
        """The arrays that the states are gathered from; the pass has to evaluate them."""
        return [array for part in self.parts for array in part.held()]

    def after(self, rows: Sequence[int], counts: Sequence[int]) -> tuple[mx.array, ...]:
        """Return the state, ``[len(rows), …]``, after ``counts[i]`` tokens of row ``rows[i]``.

        ``counts[i]`` is 1 to T. The result is not evaluated, and once it is, nothing of it
        refers to the states of other tokens.
        """
        for part in self.parts:
            if len(rows) != len(counts) or not all(1 <= count <= part.tokens for count in counts):
                raise ValueError(
                    f"states after {list(counts)} tokens of rows {list(rows)} were asked for, of "
                    f"a pass of {part.tokens} tokens"
                )
        return tuple(part.after(rows, counts) for part in self.parts)


def _index(rows: Sequence[int]) -> mx.array:
    return mx.array(np.asarray(rows, dtype=np.uint32))
