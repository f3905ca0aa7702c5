"""Where a model's attention asks its cache.

mlx-lm's models call a function of their own module, ``scaled_dot_product_attention``,
and give it the cache. ``install`` puts a function in its place that lets a cache
which has ``attend`` do the work and hands every other call on unchanged, so that
mlx-lm's own caches behave in the same process as they always did. Only modules of
the model that is served are touched, and ``remove`` undoes it.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

NAME = "scaled_dot_product_attention"
_original = base.scaled_dot_product_attention


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Stand in for mlx-lm's function of the same signature."""
    attend = getattr(cache, "attend", None)
    if attend is None or sinks is not None:
        out: mx.array = _original(queries, keys, values, cache, scale, mask, sinks)
        return out
    result: mx.array = attend(queries, keys, values, scale, mask)
    return result


def install(model: nn.Module, layers: list[int]) -> frozenset[int]:
    """Hook the modules of ``model``'s ``layers``; return the layers that go through it.

    A layer does if one of its parts is of a class whose module has mlx-lm's function
    under its usual name. Calling it again changes nothing.
    """
    hooked = set()
    for index in layers:
        for part in model.layers[index].modules():
            module = sys.modules[type(part).__module__]
            found = getattr(module, NAME, None)
            if found is _original:
                setattr(module, NAME, attention)
            if found is _original or found is attention:
                hooked.add(index)
    return frozenset(hooked)


def remove() -> None:
    """Put mlx-lm's function back wherever it was replaced."""
    for module in list(sys.modules.values()):
        if vars(module).get(NAME) is attention and module.__name__ != __name__:
            setattr(module, NAME, _original)
