"""The token ids that a loaded model has rows for.

MLX reads any memory for an index beyond an array, without an error, so an id without a row gives
garbage or NaN. The number of rows is that of every embedding which the model's code indexes with
the very token ids that it is given: a pass of one token is built, and not evaluated, while the
embeddings note what they are called with. Embeddings of positions are called with other arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.backend.model.rows import TokenRows

_EMBEDDINGS: tuple[Any, ...] = (nn.Embedding, nn.QuantizedEmbedding)


def of_model(model: nn.Module) -> TokenRows:
    """Return the rows of the embeddings and the columns of the logits of ``model``."""
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.zeros((1, 1), dtype=mx.int32)
    with _recording() as calls:
        logits = model(tokens, cache=make_prompt_cache(model))
    columns = int(logits.shape[-1])
    rows = [int(module.weight.shape[0]) for module, ids in calls if ids is tokens]
    return TokenRows(min(rows, default=columns), columns)


@contextmanager
def _recording() -> Iterator[list[tuple[Any, Any]]]:
    """Record the calls of embeddings: module and ids."""
    calls: list[tuple[Any, Any]] = []
    before: list[Callable[..., Any]] = [kind.__call__ for kind in _EMBEDDINGS]

    def recorded(call: Callable[..., Any]) -> Callable[..., Any]:
        def note(self: Any, ids: Any) -> Any:
            calls.append((self, ids))
            return call(self, ids)

        return note

    try:
        for kind, call in zip(_EMBEDDINGS, before, strict=True):
            kind.__call__ = recorded(call)
        yield calls
    finally:
        for kind, call in zip(_EMBEDDINGS, before, strict=True):
            kind.__call__ = call
