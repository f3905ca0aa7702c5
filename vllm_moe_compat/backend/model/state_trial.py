"""A trial of recorded states, before the first request.

What a layer does with its state is found out by trying, not by the family's name: after a short
prompt, some tokens go through passes of one token and through a recorded pass, both on mlx-lm's
own caches. The states after each token have to be the same, up to rounding: a family may compute
attention of several tokens in another way, and so the inputs of later layers. A state that belongs
to another token is closer to that token's, which is compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.model.dry_run import FAILURES
from vllm_moe_compat.backend.pages.state_pool import State
from vllm_moe_compat.backend.pages.states_by_position import StatesByPosition
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.ranks import pipeline

# Relative L2 error of an array: half precision may change a router's choice.
TOLERANCE = {mx.float32: 1e-3, mx.bfloat16: 0.25, mx.float16: 0.25}
PROMPT, TOKENS = 4, 3
ATTEMPTS = 8
"""Other token ids are taken where some have NaN in their rows."""


class Recording(Protocol):
    """What is tried: ``state_recording.StateRecording``."""

    def during(self) -> AbstractContextManager[None]:
        """Record the passes that are built inside."""

    def caches(self, states: Sequence[State], lengths: npt.NDArray[np.int64]) -> list[Any]:
        """Return one cache per layer."""

    def by_position(self, caches: Sequence[Any]) -> list[StatesByPosition]:
        """Return the states after each token."""


def failure(model: nn.Module, recording: Recording) -> str:
    """Return why the states of ``model`` cannot be recorded; empty if they can.

    Evaluates passes: all ranks of a model have to call it.

    Raises:
        CompatError: an expert cannot be read.
    """
    if not _Caches(model).stateful and not pipeline.is_stage(model):
        return ""
    for attempt in range(ATTEMPTS):
        begin = 1 + attempt * (PROMPT + TOKENS)
        ids = mx.arange(begin, begin + PROMPT + TOKENS, dtype=mx.int32)[None]
        expected, logits = _step_by_step(model, ids)
        # All ranks have these logits, so that they go on together.
        if mx.isfinite(logits.max()).item():
            break
    else:
        return "the logits of all tokens that were tried are NaN or infinite"
    try:
        recorded = _recorded(model, recording, ids)
    except CompatError:
        raise
    except FAILURES as error:
        return f"{error}"
    for layer, found in enumerate(recorded):
        for count in range(1, TOKENS + 1):
            for index, part in enumerate(found.after([0], [count])):
                errors = [_error(part, states[layer][index]) for states in expected]
                own = errors[count - 1]
                if not own <= TOLERANCE[logits.dtype] or own > min(errors):
                    return (
                        f"array {index} of state {layer}, {part.shape[1:]}, recorded after "
                        f"{count} of {TOKENS} tokens, differs from that of a pass of one token "
                        f"by {own:.2g} (relative L2)"
                    )
    return ""


def _error(found: mx.array, expected: mx.array) -> float:
    """Return the relative L2 error."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    size = float(mx.linalg.norm(expected.flatten()).item())  # type: ignore[arg-type]
    difference = float(mx.linalg.norm((found - expected).flatten()).item())  # type: ignore[arg-type]
    return difference / size if size else difference


def _step_by_step(model: nn.Module, ids: mx.array) -> tuple[list[list[State]], mx.array]:
    """Return the states after each pass of one token, and the logits of the passes."""
    caches, found, logits = _Caches(model), list[list[State]](), list[mx.array]()
    _evaluate(model, model(ids[:, :PROMPT], cache=caches.made), caches.states)
    for token in range(PROMPT, PROMPT + TOKENS):
        logits.append(model(ids[:, token : token + 1], cache=caches.made))
        found.append(caches.states)
        _evaluate(model, logits[-1], found[-1])
    return found, mx.concatenate(logits)


def _recorded(model: nn.Module, recording: Recording, ids: mx.array) -> list[StatesByPosition]:
    caches = _Caches(model)
    _evaluate(model, model(ids[:, :PROMPT], cache=caches.made), caches.states)
    recorded = recording.caches(caches.states, np.asarray([TOKENS]))
    with recording.during():
        logits = model(ids[:, PROMPT:], cache=caches.replaced(recorded))
    found = recording.by_position(recorded)
    _evaluate(model, logits, [layer.held for layer in found])
    return found


def _evaluate(model: nn.Module, logits: mx.array, states: Any) -> None:
    mx.eval(logits, pipeline.given(model), states)


class _Caches:
    """mlx-lm's caches of a model, of which those with states can be replaced."""

    def __init__(self, model: nn.Module) -> None:
        from mlx_lm.models.cache import ArraysCache, make_prompt_cache

        self.made = make_prompt_cache(model)
        self.stateful: list[Any] = []
        self._each(
            lambda cache: self.stateful.append(cache) if isinstance(cache, ArraysCache) else None
        )

    def _each(self, change: Callable[[Any], Any]) -> list[Any]:
        from mlx_lm.models.cache import CacheList

        return [
            CacheList(*map(change, one.caches)) if isinstance(one, CacheList) else change(one)
            for one in self.made
        ]

    @property
    def states(self) -> list[State]:
        """The states of all layers that have one."""
        return [tuple(cache.cache) for cache in self.stateful]

    def replaced(self, others: Sequence[Any]) -> list[Any]:
        """Return the caches that the model takes, with ``others`` for those with states."""
        instead = {id(one): other for one, other in zip(self.stateful, others, strict=True)}
        return self._each(lambda cache: instead.get(id(cache), cache))
