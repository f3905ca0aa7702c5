"""The hidden states that a model's backbone hands to its output head.

Prediction heads continue from them. They are what vLLM's drafter is given: the result of the
target's ``forward`` (``gpu_model_runner.propose_draft_token_ids`` in ``v1/worker``), which for
every family with heads is the output of the backbone's final norm.

mlx-lm's models return logits only. While a pass that wants the hidden states is being built, the
backbone of this one instance has a class that notes what it returns; before and after it has its
own class, so nothing is left on the model, and nothing keeps an array of the pass alive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.backend.model import backbone
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.expert_cache.current_pass import building_only


class Taken:
    """Hidden states of the passes that were built since it was made."""

    def __init__(self) -> None:
        self._noted: list[Any] = []

    def note(self, hidden: Any) -> None:
        """Note what the backbone returned."""
        self._noted.append(hidden)

    def take(self) -> mx.array:
        """Return the hidden states ``[B, T, H]`` of the one pass, and forget them.

        They are to be evaluated together with the pass: until then they hold the pages that it
        reads, and a write to these would copy the pool.

        Raises:
            RuntimeError: no pass was built, or several.
        """
        noted, self._noted = self._noted, []
        if len(noted) != 1:
            raise RuntimeError(f"{len(noted)} passes were built, where one was expected")
        hidden: mx.array = noted[0]
        return hidden


class HiddenStates:
    """Takes hidden states out of the passes of one model."""

    def __init__(self, model: nn.Module) -> None:
        """Find the backbone, and build a pass to see that it returns hidden states.

        Raises:
            UnsupportedServingError: it has none, or returns something else.
        """
        from mlx_lm.models.cache import make_prompt_cache

        self._backbone = backbone.of_model(model)
        self._taken: list[Taken] = []
        self._kind = _noting(type(self._backbone), self._taken)
        with self.during() as taken, building_only():
            model(mx.zeros((1, 2), dtype=mx.int32), cache=make_prompt_cache(model))
        found = taken.take()
        if not isinstance(found, mx.array) or found.shape[:2] != (1, 2) or found.ndim != 3:
            raise UnsupportedServingError(
                f"The embedded MLX backend cannot serve {type(model).__module__} with prediction "
                f"heads: {type(self._backbone).__name__} does not return hidden states, which "
                "they continue from; serve it without speculation, or with the method ngram."
            )

    @contextmanager
    def during(self) -> Iterator[Taken]:
        """Note the hidden states of the pass that is built inside.

        A compiled pass has to return them among its outputs: they are noted while it is traced.
        """
        taken, kind = Taken(), type(self._backbone)
        self._taken.append(taken)
        self._backbone.__class__ = self._kind
        try:
            yield taken
        finally:
            self._backbone.__class__ = kind
            self._taken.remove(taken)


def _noting(kind: type, takers: Sequence[Taken]) -> type:
    """Return a subclass of ``kind`` whose result the last of ``takers`` notes."""

    def call(module: Any, *args: Any, **options: Any) -> Any:
        hidden = kind.__call__(module, *args, **options)
        takers[-1].note(hidden)
        return hidden

    return backbone.subclass(kind, __call__=call)
