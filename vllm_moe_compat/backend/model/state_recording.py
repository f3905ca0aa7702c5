"""The states after every token of one pass, without a change of mlx-lm's code.

A pass that verifies drafts has to leave each row's state as after the accepted tokens, whose
number is known only once its logits are. So the pass is recorded: recurrences run token by token
(``recurrences``), the inputs of convolutions are noted (``sliding_tails``), and each layer's cache
collects both (``recording_cache``). Projections, experts and attention are computed once for all
tokens. The states are those that as many passes of one token leave; on the CPU, bit for bit.

Hooks are in place only while a recorded pass is built. Every other pass, of this model or another
one, runs as if they did not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.model import state_trial
from vllm_moe_compat.backend.model.recording_cache import CURRENT, RecordingCache
from vllm_moe_compat.backend.model.recurrences import RecurrenceHook
from vllm_moe_compat.backend.model.sliding_tails import TailHook
from vllm_moe_compat.backend.pages import state_caches
from vllm_moe_compat.backend.pages.state_pool import State
from vllm_moe_compat.backend.pages.states_by_position import StatesByPosition, Steps


class StateRecording:
    """Recorded passes of one model.

    Attributes:
        unsupported: why the states of this model cannot be recorded; empty if they can.
    """

    def __init__(self, model: nn.Module) -> None:
        """Try a recorded pass; this evaluates passes, so all ranks of a model make theirs.

        Raises:
            CompatError: an expert cannot be read.
        """
        self._recurrences, self._tails = RecurrenceHook(model), TailHook(model)
        self.unsupported = state_trial.failure(model, self)

    @contextmanager
    def during(self) -> Iterator[None]:
        """Record the passes that are built inside with caches of ``caches``."""
        token = CURRENT.set(None)
        try:
            with self._recurrences.during(), self._tails.during():
                yield
        finally:
            CURRENT.reset(token)

    def caches(self, states: Sequence[State], lengths: npt.NDArray[np.int64]) -> list[Any]:
        """Return one cache per layer for a recorded pass of ``max(lengths)`` tokens.

        Args:
            states: before the pass, per layer.
            lengths: ``[B]``, tokens of each row; shorter rows are padded on the right.
        """
        tokens = int(lengths.max())
        if tokens == 1:  # The states that it leaves are those after its only token.
            return state_caches.make_caches(states, lengths)
        return [RecordingCache(state, tokens) for state in states]

    def by_position(self, caches: Sequence[Any]) -> list[StatesByPosition]:
        """Return the states after each token, per layer, of a pass that was built on ``caches``.

        They are not evaluated; ``StatesByPosition.held`` has to be, together with the pass. What
        the caches themselves hold after a recorded pass is of no use.

        Raises:
            UnrecordedStateError: a layer's state cannot be recorded.
        """
        return [
            cache.by_position()
            if isinstance(cache, RecordingCache)
            else StatesByPosition(tuple(Steps((part,)) for part in cache.cache))
            for cache in caches
        ]
