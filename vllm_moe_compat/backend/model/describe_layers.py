"""What a loaded model's layers keep between steps, found from the model itself.

In: an mlx-lm model. Out: one description per cache that the model makes for
itself, softmax attention or a state of fixed size, with the exact shapes that
it would hold. They come from forward passes that are built but never evaluated,
not from index arithmetic on the config. A layer that keeps anything else is
refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.errors import UnsupportedServingError

# Layers with a state whose code leaves it alone where a row is padded on the right.
PADDED_STATE_MODULES = frozenset(
    {
        ("mlx_lm.models.qwen3_5", "GatedDeltaNet"),
        ("mlx_lm.models.qwen3_next", "Qwen3NextGatedDeltaNet"),
        ("mlx_lm.models.lfm2", "ShortConv"),
        ("mlx_lm.models.lfm2_moe", "ShortConv"),
    }
)


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Softmax attention: keys and values ``[kv_heads, tokens, head_dim]`` each.

    Attributes:
        index: which of the model's caches, those of a layer with several one by one.
        slot: in which of the model's list.
        value_dim: of the values where it is another than the keys'.
        window: each token sees so many, itself included; None: all.
        direct: the attention function gets just what the cache returned, so that
            the cache may attend by itself.
        alone: the model's code takes one sequence at a time.
    """

    index: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype
    value_dim: int | None = None
    window: int | None = None
    direct: bool = True
    alone: bool = False
    slot: int = -1

    @property
    def planes(self) -> int:
        """Keys and values lie in two planes of a page, or beside each other in one."""
        return 2 if self.value_dim is None else 1

    @property
    def row(self) -> int:
        """Elements of one token and head in one plane."""
        return self.head_dim + (self.value_dim or 0)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.planes * self.kv_heads * self.row * int(self.dtype.size)


@dataclass(frozen=True, slots=True)
class StateLayer:
    """A state of fixed size: for instance a convolution's tail and a recurrence.

    Attributes:
        index: which of the model's caches, as above.
        slot: in which of the model's list.
        shapes: of its arrays, one sequence's.
        dtypes: theirs.
        padded: the layer knows which tokens of a row are padding.
    """

    index: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]
    padded: bool = True
    slot: int = -1


Layer = AttentionLayer | StateLayer


class Rows(Enum):
    """Which sequences a forward pass may take together."""

    PADDED = "any"
    EVEN = "with as many tokens"
    SINGLE = "none"


def rows_of(layers: Sequence[Layer]) -> Rows:
    """What all of ``layers`` allow."""
    if any(isinstance(layer, AttentionLayer) and layer.alone for layer in layers):
        return Rows.SINGLE
    if any(isinstance(layer, StateLayer) and not layer.padded for layer in layers):
        return Rows.EVEN
    return Rows.PADDED


def describe(model: nn.Module) -> list[Layer]:
    """Describe what every cache of ``model`` keeps.

    Raises:
        UnsupportedServingError: one keeps something that the pools cannot hold.
    """
    from mlx_lm.models.cache import make_prompt_cache

    made = make_prompt_cache(model)
    caches = _flat(made)
    names = _names(model, caches, len(made))
    for name, (_, cache) in zip(names, caches, strict=True):
        _check_kind(name, cache)
    # Two tokens: enough for every cache to be filled, too few to be masked away.
    model(mx.zeros((1, 2), dtype=mx.int32), cache=made)
    layers = [
        _describe_one(index, slot, name, cache, _knows_padding(model, slot, len(made)))
        for index, (name, (slot, cache)) in enumerate(zip(names, caches, strict=True))
    ]
    if not any(isinstance(layer, AttentionLayer) for layer in layers):
        raise _refusal(
            f"{type(model).__module__}",
            "none of its layers keeps keys and values, which vLLM's pages are made of",
        )
    # One more token, as in decoding: who asks its cache for what, and keeps its size?
    with attention_hook.watching(model, [cache for _, cache in caches]) as watched:
        model(mx.zeros((1, 1), dtype=mx.int32), cache=made)
    direct = watched.direct() and not any(
        isinstance(layer, AttentionLayer) and layer.planes == 1 for layer in layers
    )
    for name, layer, (_, cache) in zip(names, layers, caches, strict=True):
        if isinstance(layer, StateLayer):
            _check_fixed(name, layer, cache)
    return [
        replace(layer, direct=direct) if isinstance(layer, AttentionLayer) else layer
        for layer in layers
    ]


def _flat(made: Sequence[Any]) -> list[tuple[int, Any]]:
    """All caches with their place in the model's list; a layer may have several."""
    from mlx_lm.models.cache import CacheList

    return [
        (slot, part)
        for slot, cache in enumerate(made)
        for part in (cache.caches if type(cache) is CacheList else (cache,))
    ]


def nested(layers: Sequence[Layer]) -> bool:
    """Whether some layer has several caches."""
    slots = [layer.slot for layer in layers if layer.slot >= 0]
    return len(set(slots)) < len(slots)


def nest(layers: Sequence[Layer], caches: Sequence[Any]) -> list[Any]:
    """The list that the model takes, from ``caches`` in the order of ``layers``."""
    from mlx_lm.models.cache import CacheList

    slots: dict[int, list[Any]] = {}
    for layer, cache in zip(layers, caches, strict=True):
        slots.setdefault(layer.slot, []).append(cache)
    return [CacheList(*parts) if len(parts) > 1 else parts[0] for parts in slots.values()]


def _names(model: nn.Module, caches: Sequence[tuple[int, Any]], slots: int) -> list[str]:
    """How to call each cache in a sentence: by its layer, where there is one each."""
    if slots == len(model.layers):
        kinds = [f"{type(layer).__module__}.{type(layer).__name__}" for layer in model.layers]
        return [f"layer {slot} ({kinds[slot]})" for slot, _ in caches]
    return [f"{type(model).__module__}, cache {slot} of {slots}" for slot, _ in caches]


def _refusal(who: str, why: str) -> UnsupportedServingError:
    return UnsupportedServingError(
        f"The embedded MLX backend cannot serve {who}: {why}; use mlx-lm's own server for this "
        "model."
    )


def _check_kind(name: str, cache: Any) -> None:
    from mlx_lm.models import cache as kinds

    known = (kinds.KVCache, kinds.RotatingKVCache, kinds.ChunkedKVCache, kinds.ArraysCache)
    if type(cache) not in known:
        raise _refusal(
            name,
            f"it keeps a {type(cache).__name__}, and only keys and values of softmax attention and "
            "states of fixed size have paged storage",
        )
    if getattr(cache, "keep", 0):
        raise _refusal(name, f"its window always keeps the first {cache.keep} tokens")


def _describe_one(index: int, slot: int, name: str, cache: Any, padded: bool) -> Layer:
    from mlx_lm.models.cache import ArraysCache, RotatingKVCache

    if isinstance(cache, ArraysCache):
        if any(part is None for part in cache.cache):
            raise _refusal(name, "a part of its state stays empty")
        shapes = tuple(tuple(part.shape[1:]) for part in cache.cache)
        dtypes = tuple(part.dtype for part in cache.cache)
        return StateLayer(index, shapes, dtypes, padded, slot)
    if cache.keys is None:
        raise _refusal(name, f"its {type(cache).__name__} stays empty")
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


def _check_fixed(name: str, layer: StateLayer, cache: Any) -> None:
    """Refuse a state that another token makes larger.

    Raises:
        UnsupportedServingError: it does.
    """
    for shape, dtype, part in zip(layer.shapes, layer.dtypes, cache.cache, strict=True):
        if tuple(part.shape[1:]) != shape or part.dtype != dtype:
            raise _refusal(
                name,
                f"its state changes from {shape} {dtype} to {tuple(part.shape[1:])} {part.dtype}",
            )


def _knows_padding(model: nn.Module, slot: int, slots: int) -> bool:
    return slots == len(model.layers) and any(
        (type(child).__module__, type(child).__name__) in PADDED_STATE_MODULES
        for child in model.layers[slot].children().values()
        if isinstance(child, nn.Module)
    )
