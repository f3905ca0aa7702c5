"""Whether a model's own code takes paged caches, and several sequences at once.

In: a model and the description of its layers. Out: the description, with a note
where one pass may hold one sequence only. A pass of one token is built on pools
of a few pages and never evaluated: code that cannot count with a vector of
positions, or take a mask for each row, fails while the graph is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache

from vllm_moe_compat.backend.model.layers import AttentionLayer, Layer, nest
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.paged_kv import AttentionStep, PagedKV
from vllm_moe_compat.errors import UnsupportedServingError

BLOCK = 16
# As no model has heads: a mask [B, 1, 1, L] must not fit in another axis by accident.
ROWS = 7
# What MLX, numpy and Python raise when a vector is no number or a shape does not fit.
FAILURES = (TypeError, ValueError, AttributeError, IndexError, RuntimeError)


def settle(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Try the model's code with paged caches; mark layers that must run ``alone``.

    Raises:
        UnsupportedServingError: it fails with one sequence, too.
    """
    failure = _fails(model, layers, rows=ROWS)
    if failure is None:
        return list(layers)
    alone = [
        replace(layer, alone=True) if isinstance(layer, AttentionLayer) else layer
        for layer in layers
    ]
    fatal = _fails(model, alone, rows=1)
    if fatal is not None:
        raise UnsupportedServingError(
            f"The embedded MLX backend cannot serve {type(model).__module__}: its code does not "
            f"run on paged caches ({type(fatal).__name__}: {fatal}); use mlx-lm's own server for "
            "this model."
        )
    return alone


def _fails(model: nn.Module, layers: Sequence[Layer], rows: int) -> Exception | None:
    """What goes wrong when a pass over ``rows`` sequences is built, or None."""
    offsets = np.arange(3, 3 + rows, dtype=np.int64)
    tables = np.arange(1, 1 + rows, dtype=np.int64)[:, None]
    plain = AttentionStep(offsets, np.ones(rows, dtype=np.int64), tables, BLOCK)
    caches: list[Any] = []
    for layer in layers:
        if isinstance(layer, AttentionLayer):
            pool = PagePool(1 + rows, layer.token_bytes * BLOCK, layer.dtype)
            step = plain if layer.window is None else plain.windowed(layer.window)
            caches.append(PagedKV(layer, pool, step, asked=layer.direct))
        else:
            cache = ArraysCache(size=len(layer.shapes))
            cache.cache = [
                mx.zeros((rows, *shape), dtype=dtype)
                for shape, dtype in zip(layer.shapes, layer.dtypes, strict=True)
            ]
            caches.append(cache)
    try:
        model(mx.zeros((rows, 1), dtype=mx.int32), cache=nest(layers, caches))
    except UnsupportedServingError:
        raise
    except FAILURES as failure:
        return failure
    return None
