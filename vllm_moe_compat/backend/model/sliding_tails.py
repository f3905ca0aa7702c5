"""States that hold the end of a sequence: inputs of convolutions, token ids.

After any token of a pass, such a state is a window of the sequence of what the state held before
and the pass's own. That sequence is what the layer's ``nn.Conv1d`` takes, or it is put together
from the arguments of a method. For the time of a context, the instances get classes that note it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.backend.model.recording_cache import current
from vllm_moe_compat.families.fixes.fix import named

Sequence = Callable[..., tuple[mx.array, int]]
"""Takes the arguments of a method; returns the sequence, and the axis of its tokens."""


def _convolution(x: mx.array) -> tuple[mx.array, int]:
    return x, 1


def _own_convolution(x: mx.array, cache: mx.array) -> tuple[mx.array, int]:
    return mx.concatenate([cache, x], axis=1), 1


def _neighbours(u: mx.array, weights: mx.array, state: mx.array) -> tuple[mx.array, int]:
    return mx.concatenate([state, u], axis=2), 2


def _token_ids(input_ids: mx.array, cache: Any) -> tuple[mx.array, int]:
    return mx.concatenate([cache[0], input_ids.astype(cache[0].dtype)], axis=1), 1


TAILS: dict[str, tuple[str, Sequence]] = {
    f"{nn.Conv1d.__module__}.Conv1d": ("__call__", _convolution),
    "mlx_lm.models.recurrent_gemma.Conv1d": ("__call__", _own_convolution),
    "mlx_lm.models.baichuan_m1.Attention": ("_custom_convolution", _neighbours),
    "mlx_lm.models.longcat_flash_ngram.NgramEmbedding": ("__call__", _token_ids),
}
"""Class → method that takes the sequence or its parts, and how the sequence is found."""


@cache
def _noting(kind: type, method: str, sequence: Sequence) -> type:
    """Return a subclass of ``kind`` that notes the sequence when ``method`` is called."""
    original = getattr(kind, method)

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        # Before the call, which may change the cache that is among the arguments.
        found, recording = sequence(*args, **options), current()
        if recording is not None:
            recording.add_window(*found)
        return original(self, *args, **options)

    return named(type(kind.__name__, (kind,), {method: noted}), kind)


class TailHook:
    """Notes the sequences of one model's layers, for the time of a context."""

    def __init__(self, model: nn.Module) -> None:
        self._parts: list[tuple[Any, str, Sequence]] = []
        for part in model.modules():
            for kind in type(part).__mro__:
                name = f"{kind.__module__}.{kind.__qualname__}"
                if name in TAILS:
                    self._parts.append((part, *TAILS[name]))
                    break

    @contextmanager
    def during(self) -> Iterator[None]:
        """Hand sequences to the recording cache that was read last."""
        before: list[type] = [type(part) for part, _, _ in self._parts]
        try:
            for kind, (part, method, sequence) in zip(before, self._parts, strict=True):
                part.__class__ = _noting(kind, method, sequence)
            yield
        finally:
            for kind, (part, _, _) in zip(before, self._parts, strict=True):
                part.__class__ = kind
