"""Replacement of mlx-lm's attention function, so that a cache can compute attention itself.

mlx-lm's models call ``scaled_dot_product_attention`` of their own module and pass it the cache.
``install`` replaces that function in the modules of one model: a cache with a method ``attend``
computes attention itself, and every other call goes to the original, so mlx-lm's own caches
behave as before in the same process. ``install`` returns the function that undoes it.
``recording`` observes, before serving, the arguments of a model's attention calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

NAME = "scaled_dot_product_attention"
_original = base.scaled_dot_product_attention
_users: dict[str, set[object]] = {}
"""Module name → one key for every ``install`` that was not undone."""


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Replace mlx-lm's function of the same signature."""
    attend = getattr(cache, "attend", None)
    if attend is None:
        out: mx.array = _original(queries, keys, values, cache, scale, mask, sinks)
        return out
    result: mx.array = attend(queries, keys, values, scale, mask, sinks)
    return result


def install(model: nn.Module) -> Callable[[], None]:
    """Hook the modules of ``model``; return a function that removes the hook again.

    Models may share modules. A module gets mlx-lm's function back when the last model that
    uses it is removed, since paged caches give wrong results without the hook. Removing twice
    changes nothing.
    """
    key = object()
    modules = _modules(model)
    for module in modules:
        _users.setdefault(module.__name__, set()).add(key)
        setattr(module, NAME, attention)

    def remove() -> None:
        for module in modules:
            users = _users.get(module.__name__, set())
            users.discard(key)
            if not users:
                _users.pop(module.__name__, None)
                if vars(module).get(NAME) is attention:
                    setattr(module, NAME, _original)

    return remove


def installed() -> list[str]:
    """Return the names of the modules that are hooked."""
    return sorted(_users)


def _modules(model: nn.Module) -> list[ModuleType]:
    """Return modules of the model's classes whose function is mlx-lm's, or already ours."""
    found = {type(part).__module__ for part in model.modules()}
    modules = [sys.modules[name] for name in sorted(found)]
    return [m for m in modules if vars(m).get(NAME) in (_original, attention)]


@dataclass
class AttentionRecord:
    """Arrays that a forward pass exchanged with its caches.

    Attributes:
        fetched: id of a softmax cache → ids of the keys and values that it returned.
        masks: everything that caches returned as a mask.
        calls: (cache, keys, values, mask) of every call of the attention function.
        heads: number and size of the query heads of every call.
    """

    fetched: dict[int, tuple[int, int]] = field(default_factory=dict)
    masks: list[Any] = field(default_factory=list)
    calls: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)
    heads: list[tuple[int, int]] = field(default_factory=list)

    def unchanged(self) -> bool:
        """Return whether each cache was read once and its arrays reached attention unchanged.

        Only then may a cache compute attention without handing out keys and values. It is False
        where layers share keys, compute others from them, or modify the mask.
        """
        return len(self.calls) == len(self.fetched) > 0 and all(
            self.fetched.get(id(cache)) == (id(keys), id(values))
            and (mask is None or any(mask is one for one in self.masks))
            for cache, keys, values, mask in self.calls
        )


@contextmanager
def recording(model: nn.Module, caches: Sequence[Any]) -> Iterator[AttentionRecord]:
    """Record passes of ``model`` with ``caches``, which are mlx-lm's own."""
    record = AttentionRecord()

    def recorded(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        record.calls.append((cache, keys, values, mask))
        record.heads.append((queries.shape[1], queries.shape[-1]))
        out: mx.array = _original(queries, keys, values, cache, scale, mask, sinks)
        return out

    for cache in caches:
        if hasattr(cache, "update_and_fetch"):
            _record_cache(cache, record)
    modules = _modules(model)
    before = [getattr(module, NAME) for module in modules]
    try:
        for module in modules:
            setattr(module, NAME, recorded)
        yield record
    finally:
        for module, function in zip(modules, before, strict=True):
            setattr(module, NAME, function)
        for cache in caches:
            # The methods refer to the cache that holds them, and the arrays to the weights that
            # they would be computed from, so only the garbage collector would free those.
            for name in _RECORDED:
                vars(cache).pop(name, None)


_RECORDED = ("update_and_fetch", "make_mask", "recorded")
"""What ``_record_cache`` sets on a cache."""


def _record_cache(cache: Any, record: AttentionRecord) -> None:
    fetch, make_mask = cache.update_and_fetch, getattr(cache, "make_mask", None)

    def update_and_fetch(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        found: tuple[mx.array, mx.array] = fetch(keys, values)
        record.fetched[id(cache)] = (id(found[0]), id(found[1]))
        # Keep the arrays alive: the id of a freed object may be reused.
        cache.recorded = found
        return found

    def recorded_mask(*args: Any, **options: Any) -> Any:
        record.masks.append(make_mask(*args, **options))  # type: ignore[misc]
        return record.masks[-1]

    cache.update_and_fetch = update_and_fetch
    if make_mask is not None:
        cache.make_mask = recorded_mask
