"""A cache of one state layer that notes how its state changes within a pass.

It is mlx-lm's ``ArraysCache`` to the layer that uses it. While hooks are installed
(``state_recording``), recurrences and convolutions hand their states to the cache that was read
last: a layer reads its cache before it computes from it. What belongs to which array of the
state is told by what the layer stores: a recurrence stores the very array that came last, and the
tails of convolutions are stored in the order of the convolutions.

The cache has no lengths, so layers make no masks. Rows are padded on the right and do not see
each other; padding changes only states that no row asks for, and the recorded code is that of a
pass of one token, which has no masks either.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from vllm_moe_compat.backend.pages.states_by_position import StatesByPosition, Steps, Window

CURRENT: ContextVar[RecordingCache | None] = ContextVar("recording_cache", default=None)
"""The cache that was read last, while a pass is recorded."""


class UnrecordedStateError(ValueError):
    """A layer changed its state in a way that the recording does not know."""


class RecordingCache(ArraysCache):
    """The cache of one layer in one pass of several tokens."""

    def __init__(self, state: Sequence[mx.array], tokens: int) -> None:
        """``state``: arrays ``[B, *shape]`` before the pass; ``tokens``: of the pass."""
        super().__init__(size=len(state))
        self.cache: list[mx.array] = list(state)
        self.tokens = tokens
        self._shapes = [(tuple(part.shape), part.dtype) for part in state]
        self._recorded: list[Steps | Window] = []
        self._stepped: list[mx.array] = []
        # What the layer stored first; a pipeline stores the same again, tied to what it sends.
        self._stored: dict[int, mx.array] = {}

    def __getitem__(self, index: int) -> mx.array:
        CURRENT.set(self)
        return self.cache[index]

    def __setitem__(self, index: int, value: mx.array) -> None:
        self._stored.setdefault(index, value)
        self.cache[index] = value

    def add_steps(self, states: Sequence[mx.array]) -> None:
        """Note the states ``[B, *shape]`` of a recurrence after each token."""
        self._recorded.append(Steps(tuple(states)))

    def add_step(self, state: mx.array) -> None:
        """Note the state ``[B, *shape]`` of a recurrence after one more token."""
        self._stepped.append(state)

    def add_window(self, sequence: mx.array, axis: int = 1) -> None:
        """Note a sequence: the end of an earlier one, and as many places as there are tokens."""
        self._recorded.append(Window(sequence, int(sequence.shape[axis]) - self.tokens, axis))

    def by_position(self) -> StatesByPosition:
        """Return the states after each token; only after the pass was built.

        Raises:
            UnrecordedStateError: for an array of the state, nothing was noted.
        """
        free = list(self._recorded)
        if self._stepped:
            free.append(Steps(tuple(self._stepped)))
        found: dict[int, Steps | Window] = {}
        for index, value in self._stored.items():
            for part in free:
                if isinstance(part, Steps) and part.arrays[-1] is value:
                    found[index] = part
                    free.remove(part)
                    break
        for index in self._stored:
            if index not in found:
                fitting = [part for part in free if self._fits(index, part)]
                if fitting:
                    found[index] = fitting[0]
                    free.remove(fitting[0])
        for index, (shape, dtype) in enumerate(self._shapes):
            if index not in found or not self._fits(index, found[index]):
                raise UnrecordedStateError(
                    f"array {index} of {len(self._shapes)} of a state, {shape[1:]} {dtype}, "
                    "does not come from a recurrence or a convolution that is known"
                )
        return StatesByPosition(tuple(found[index] for index in range(len(self._shapes))))

    def _fits(self, index: int, part: Steps | Window) -> bool:
        return (part.tokens, (part.shape, part.dtype)) == (self.tokens, self._shapes[index])


def current() -> Any:
    """Return the cache that takes notes, or None outside of recorded passes."""
    return CURRENT.get()
