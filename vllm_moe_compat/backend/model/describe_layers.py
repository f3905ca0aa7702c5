"""Descriptions of a loaded model's layers, found by running the model lazily.

``describe`` makes the caches that mlx-lm would use, builds short forward passes with them and
reads off the shapes that they hold. Nothing is evaluated, and nothing is derived from the config
by index arithmetic. A cache that the pools cannot hold is refused, naming its layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer, StateLayer
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.expert_cache.current_pass import building_only
from vllm_moe_compat.families.registry import row_for
from vllm_moe_compat.ranks.pipeline import is_stage


def describe(model: nn.Module) -> list[Layer]:
    """Return one description per cache of ``model``.

    Raises:
        UnsupportedServingError: a cache stores something that the pools cannot hold.
    """
    from mlx_lm.models.cache import make_prompt_cache

    made = make_prompt_cache(model)
    caches = _flatten(made)
    names = _names(model, caches, len(made))
    for name, (_, cache) in zip(names, caches, strict=True):
        _check_kind(name, cache)
    # Two tokens fill every cache, and are too few for a window to drop one.
    with building_only():
        model(mx.zeros((1, 2), dtype=mx.int32), cache=made)
    row = row_for(type(model))
    padded = row is not None and row.cache.states_skip_padding
    layers = [
        _describe_one(index, slot, name, cache, padded)
        for index, (name, (slot, cache)) in enumerate(zip(names, caches, strict=True))
    ]
    if not is_stage(model) and not any(isinstance(layer, AttentionLayer) for layer in layers):
        raise _refusal(
            f"{type(model).__module__}",
            "none of its layers stores keys and values, which vLLM's pages consist of",
        )
    # A third token, as in decoding, shows which caches attention reads unchanged, and whether
    # states keep their size.
    recording = attention_hook.recording(model, [cache for _, cache in caches])
    with recording as record, building_only():
        model(mx.zeros((1, 1), dtype=mx.int32), cache=made)
    attends_itself = record.unchanged() and not any(
        isinstance(layer, AttentionLayer) and layer.planes == 1 for layer in layers
    )
    for name, layer, (_, cache) in zip(names, layers, caches, strict=True):
        if isinstance(layer, StateLayer):
            _check_fixed_size(name, layer, cache)
    return [
        replace(layer, attends_itself=attends_itself)
        if isinstance(layer, AttentionLayer)
        else layer
        for layer in layers
    ]


def _flatten(made: Sequence[Any]) -> list[tuple[int, Any]]:
    """Return all caches with their slot in the model's list; a layer may have several."""
    from mlx_lm.models.cache import CacheList

    return [
        (slot, part)
        for slot, cache in enumerate(made)
        for part in (cache.caches if type(cache) is CacheList else (cache,))
    ]


def _names(model: nn.Module, caches: Sequence[tuple[int, Any]], slots: int) -> list[str]:
    """Return a name of each cache for messages: its layer, if every layer has one slot."""
    if slots == len(model.layers):
        kinds = [f"{type(layer).__module__}.{type(layer).__name__}" for layer in model.layers]
        return [f"layer {slot} ({kinds[slot]})" for slot, _ in caches]
    return [f"{type(model).__module__}, cache {slot} of {slots}" for slot, _ in caches]


def _refusal(part: str, reason: str) -> UnsupportedServingError:
    return UnsupportedServingError(
        f"The embedded MLX backend cannot serve {part}: {reason}; use mlx-lm's own server for "
        "this model."
    )


def _check_kind(name: str, cache: Any) -> None:
    from mlx_lm.models import cache as kinds

    known = (kinds.KVCache, kinds.RotatingKVCache, kinds.ChunkedKVCache, kinds.ArraysCache)
    if type(cache) not in known:
        raise _refusal(
            name,
            f"it uses a {type(cache).__name__}, and pages can only store the keys and values of "
            "softmax attention and states of fixed size",
        )
    if getattr(cache, "keep", 0):
        raise _refusal(name, f"its window always keeps the first {cache.keep} tokens")


def _describe_one(index: int, slot: int, name: str, cache: Any, padded: bool) -> Layer:
    from mlx_lm.models.cache import ArraysCache, RotatingKVCache

    if isinstance(cache, ArraysCache):
        if any(part is None for part in cache.cache):
            raise _refusal(name, "an array of its state is never set")
        shapes = tuple(tuple(part.shape[1:]) for part in cache.cache)
        dtypes = tuple(part.dtype for part in cache.cache)
        return StateLayer(index, shapes, dtypes, padded, slot)
    if cache.keys is None:
        raise _refusal(name, f"its {type(cache).__name__} is never filled")
    _, heads, _, dim = cache.keys.shape
    _, value_heads, _, value_dim = cache.values.shape
    if value_heads != heads or not value_dim:
        raise _refusal(
            name,
            f"its keys {cache.keys.shape} and values {cache.values.shape} differ in more than "
            "the size of a head",
        )
    return AttentionLayer(
        index,
        heads,
        dim,
        cache.keys.dtype,
        value_dim=value_dim if value_dim != dim else None,
        window=cache.max_size if isinstance(cache, RotatingKVCache) else None,
        slot=slot,
    )


def _check_fixed_size(name: str, layer: StateLayer, cache: Any) -> None:
    """Refuse a state that changes its shape or dtype with another token."""
    for shape, dtype, part in zip(layer.shapes, layer.dtypes, cache.cache, strict=True):
        if tuple(part.shape[1:]) != shape or part.dtype != dtype:
            raise _refusal(
                name,
                f"its state changes from {shape} {dtype} to {tuple(part.shape[1:])} {part.dtype}",
            )
