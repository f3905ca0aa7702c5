"""mlx-lm's recurrences, run token by token so that the state after each token can be kept.

Layers with a recurrent state call a function of their module, ``gated_delta_update`` for
instance, which takes all tokens of the pass and returns their outputs and the last state. Called
once per token, it does what as many passes of one token do, bit for bit: the same code, or the
same kernel, on the same arrays. Projections and convolutions stay those of the whole pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.backend.model.recording_cache import current

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A function of mlx-lm that takes tokens and a state, and returns outputs and the last state.

    Attributes:
        tokens: argument with a value per token → axis of the tokens.
        state: argument with the state before the first token.
        output: axis of the tokens in the outputs.
        padding: arguments that only concern padding; the recording leaves them out.
    """

    tokens: Mapping[str, int]
    state: str
    output: int = 1
    padding: tuple[str, ...] = ()

    def hooked(self, function: Function) -> Function:
        """Return ``function``, which keeps states in a recorded pass."""
        signature = inspect.signature(function)
        if not {*self.tokens, self.state} <= set(signature.parameters):
            return function

        def recorded(*args: Any, **options: Any) -> Any:
            cache = current()
            if cache is None:
                return function(*args, **options)
            output, states = self.run(function, signature.bind(*args, **options).arguments)
            cache.add_steps(states)
            return output, states[-1]

        return recorded

    def run(self, function: Function, arguments: Mapping[str, Any]) -> Any:
        """Call ``function`` once per token; return its outputs, and the state after each token."""
        given = {name: value for name, value in arguments.items() if name not in self.padding}
        name, axis = next(iter(self.tokens.items()))
        outputs, states = [], []
        for token in range(arguments[name].shape[axis]):
            for name, axis in self.tokens.items():
                given[name] = _token(arguments[name], token, axis)
            output, given[self.state] = function(**given)
            outputs.append(output)
            states.append(given[self.state])
        return mx.concatenate(outputs, axis=self.output), states


def _token(array: mx.array, token: int, axis: int) -> mx.array:
    part = (*(slice(None),) * axis, slice(token, token + 1))
    # Contiguous as in a pass of one token: MLX may round strided arrays in another way.
    return mx.contiguous(array[part])


RECURRENCES = {
    "gated_delta_update": Recurrence(dict.fromkeys("qkvab", 1), "state", padding=("mask",)),
    "ssm_update": Recurrence(
        dict.fromkeys(("hidden_states", "B", "C", "dt"), 1), "state", padding=("mask", "lengths")
    ),
    "recurrent_gla": Recurrence(dict.fromkeys("qkv", 2), "h", output=2, padding=("mask",)),
    "rnn_scan": Recurrence(dict.fromkeys("xa", 1), "h0"),
}
"""Name of the function → what it takes: gated delta and Kimi's, Mamba-2, Lightning, RG-LRU."""

STEPS = (("mlx_lm.models.jamba", "fma"),)
"""(module, function) that is called once per token, and returns the state after it: Mamba."""


def _hooked_step(function: Function) -> Function:
    def recorded(*args: Any) -> Any:
        state, cache = function(*args), current()
        if cache is not None:
            cache.add_step(state)
        return state

    return recorded


class RecurrenceHook:
    """Replaces the recurrences that one model's layers call, for the time of a context."""

    def __init__(self, model: nn.Module) -> None:
        found: dict[int, dict[str, Any]] = {}
        for kind in {kind for part in model.modules() for kind in type(part).__mro__}:
            for method in vars(kind).values():
                # Not those of the module: a corrected method may have globals of its own.
                if isinstance(method, FunctionType):
                    found[id(method.__globals__)] = method.__globals__
        self._hooked: list[tuple[dict[str, Any], str, Function, Function]] = []
        for names in found.values():
            for name in RECURRENCES.keys() & names.keys():
                hooked = RECURRENCES[name].hooked(names[name])
                self._hooked.append((names, name, names[name], hooked))
            for module, name in STEPS:
                if names.get("__name__") == module and name in names:
                    self._hooked.append((names, name, names[name], _hooked_step(names[name])))

    @contextmanager
    def during(self) -> Iterator[None]:
        """Hand the states of recurrences to the recording cache that was read last."""
        try:
            for names, name, _, hooked in self._hooked:
                names[name] = hooked
            yield
        finally:
            for names, name, function, _ in self._hooked:
                names[name] = function
