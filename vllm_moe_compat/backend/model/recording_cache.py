"""A cache of one state layer that notes how its state changes within a pass.

It is mlx-lm's ``ArraysCache`` to the layer that uses it. While hooks are installed
(``state_recording``), recurrences and convolutions hand their states to the cache that was read
last: a layer reads its cache before it computes from it. An array of the state gets the first of
them that has its shape and that no array stored before has taken, since layers store what comes
of several convolutions in the order in which they compute them. Whether that is right for a layer
is found out by a trial (``state_trial``).

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
        # The arrays in the order in which the layer stored them first.
        self._stored: dict[int, None] = {}

    def __getitem__(self, index: int) -> mx.array:
        CURRENT.set(self)
        return self.cache[index]

    def __setitem__(self, index: int, value: mx.array) -> None:
        self._stored.setdefault(index)
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
        for index in self._stored:
            for part in free:
                if (part.tokens, (part.shape, part.dtype)) == (self.tokens, self._shapes[index]):
                    found[index] = part
                    free.remove(part)
                    break
        for index, (shape, dtype) in enumerate(self._shapes):
            if index not in found:
                raise UnrecordedStateError(
                    f"array {index} of {len(self._shapes)} of a state, {shape[1:]} {dtype}, "
                    "does not come from a recurrence or a convolution that is known"
                )
        return StatesByPosition(tuple(found[index] for index in range(len(self._shapes))))


def current() -> Any:
    """Return the cache that takes notes, or None outside of recorded passes."""
    return CURRENT.get()
