"""Descriptions of the data that a layer stores between steps.

``model.describe_layers`` makes one description per cache of a model; everything else in the
backend works from the descriptions and never from the model's config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Softmax attention, which stores keys and values ``[kv_heads, tokens, head_dim]``.

    Attributes:
        index: position of the cache among all caches of the model.
        kv_heads: number of KV heads.
        head_dim: elements of one key, and of one value unless ``value_dim`` is set.
        dtype: of keys and values.
        value_dim: elements of one value where it differs from ``head_dim``.
        window: sliding window in tokens, the current one included; None if there is none.
        attends_itself: the model passes the cache's own keys and values to its attention
            function, so the cache may compute attention itself and return no copies.
        single_sequence: the model's code takes one sequence per forward pass.
        slot: position in the list of caches that the model takes; caches with equal slots form
            one ``CacheList``.
    """

    index: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype
    value_dim: int | None = None
    window: int | None = None
    attends_itself: bool = True
    single_sequence: bool = False
    slot: int = -1

    @property
    def planes(self) -> int:
        """2 if keys and values have a plane of the page each, 1 if they share rows of one."""
        return 2 if self.value_dim is None else 1

    @property
    def row(self) -> int:
        """Elements of one token and head in one plane."""
        return self.head_dim + (self.value_dim or 0)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.planes * self.kv_heads * self.row * int(self.dtype.size)


@dataclass(frozen=True, slots=True)
class StateLayer:
    """A state of fixed size per sequence, such as a convolution tail and a recurrent state.

    Attributes:
        index: position of the cache among all caches of the model.
        shapes: of the state's arrays, for one sequence.
        dtypes: of the state's arrays.
        padded: the layer's code skips the padding of a row (``ArraysCache.lengths``).
        slot: as in ``AttentionLayer``.
    """

    index: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]
    padded: bool = True
    slot: int = -1


Layer = AttentionLayer | StateLayer


class Batching(Enum):
    """Which sequences one forward pass can take together."""

    PADDED = "sequences of any lengths, padded on the right"
    EQUAL_LENGTHS = "sequences with equally many new tokens"
    SINGLE_SEQUENCE = "one sequence"


def batching_of(layers: Sequence[Layer]) -> Batching:
    """Return the batching that all of ``layers`` support."""
    if any(isinstance(layer, AttentionLayer) and layer.single_sequence for layer in layers):
        return Batching.SINGLE_SEQUENCE
    if any(isinstance(layer, StateLayer) and not layer.padded for layer in layers):
        return Batching.EQUAL_LENGTHS
    return Batching.PADDED


def has_states(layers: Sequence[Layer]) -> bool:
    """Return whether some layer has a state of fixed size."""
    return any(isinstance(layer, StateLayer) for layer in layers)


def has_nested_caches(layers: Sequence[Layer]) -> bool:
    """Return whether some layer of the model has several caches."""
    slots = [layer.slot for layer in layers if layer.slot >= 0]
    return len(set(slots)) < len(slots)


def nest_caches(layers: Sequence[Layer], caches: Sequence[Any]) -> list[Any]:
    """Return the list of caches that the model takes, from one cache per description."""
    from mlx_lm.models.cache import CacheList

    slots: dict[int, list[Any]] = {}
    for layer, cache in zip(layers, caches, strict=True):
        slots.setdefault(layer.slot, []).append(cache)
    return [CacheList(*parts) if len(parts) > 1 else parts[0] for parts in slots.values()]
