"""Where a model's attention asks its cache.

mlx-lm's models call a function of their own module, ``scaled_dot_product_attention``,
and give it the cache. ``install`` puts a function in its place that lets a cache
which has ``attend`` do the work and hands every other call on unchanged, so that
mlx-lm's own caches behave in the same process as they always did. Only modules of
the model that is served are touched, and ``remove`` undoes it. ``watching`` finds
out beforehand what a model asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
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
    if attend is None:
        out: mx.array = _original(queries, keys, values, cache, scale, mask, sinks)
        return out
    result: mx.array = attend(queries, keys, values, scale, mask, sinks)
    return result


def install(model: nn.Module) -> None:
    """Hook the modules of ``model``'s parts; calling it again changes nothing."""
    for module in _modules(model):
        setattr(module, NAME, attention)


def remove() -> None:
    """Put mlx-lm's function back wherever it was replaced."""
    for module in list(sys.modules.values()):
        if vars(module).get(NAME) is attention and module.__name__ != __name__:
            setattr(module, NAME, _original)


def _modules(model: nn.Module) -> list[ModuleType]:
    """Modules of the model's classes that have mlx-lm's function, or ours, under its name."""
    found = {type(part).__module__ for part in model.modules()}
    modules = [sys.modules[name] for name in sorted(found)]
    return [m for m in modules if vars(m).get(NAME) in (_original, attention)]


@dataclass
class Watched:
    """What a forward pass did with caches.

    ``fetched``: keys and values that each of the softmax caches returned;
    ``masks``: all that caches returned as masks; ``calls``: what the attention
    function got as cache, keys, values and mask.
    """

    fetched: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    masks: list[Any] = field(default_factory=list)
    calls: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)

    def direct(self) -> bool:
        """Whether every cache was asked once, and its answer passed on as it was.

        Then keys and values need not leave the cache at all. It is not so where
        layers share keys, compute others from them, or change the mask.
        """
        return len(self.calls) == len(self.fetched) > 0 and all(
            self.fetched.get(id(cache), (None, None)) == (id(keys), id(values))
            and (mask is None or any(mask is one for one in self.masks))
            for cache, keys, values, mask in self.calls
        )


@contextmanager
def watching(model: nn.Module, caches: Sequence[Any]) -> Iterator[Watched]:
    """Note what passes of ``model`` with these (mlx-lm's own) caches do inside."""
    watched = Watched()

    def noted(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        watched.calls.append((cache, keys, values, mask))
        out: mx.array = _original(queries, keys, values, cache, scale, mask, sinks)
        return out

    for cache in caches:
        if hasattr(cache, "update_and_fetch"):
            _watch(cache, watched)
    modules = _modules(model)
    before = [getattr(module, NAME) for module in modules]
    try:
        for module in modules:
            setattr(module, NAME, noted)
        yield watched
    finally:
        for module, function in zip(modules, before, strict=True):
            setattr(module, NAME, function)


def _watch(cache: Any, watched: Watched) -> None:
    fetch, make_mask = cache.update_and_fetch, getattr(cache, "make_mask", None)

    def update_and_fetch(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        found: tuple[mx.array, mx.array] = fetch(keys, values)
        watched.fetched[id(cache)] = (id(found[0]), id(found[1]))
        # Held, so that no other array gets the same id.
        cache.watched = found
        return found

    def noted_mask(*args: Any, **options: Any) -> Any:
        watched.masks.append(make_mask(*args, **options))  # type: ignore[misc]
        return watched.masks[-1]

    cache.update_and_fetch = update_and_fetch
    if make_mask is not None:
        cache.make_mask = noted_mask
