"""What a loaded model's layers keep between steps, found from the model itself.

In: an mlx-lm model. Out: one description per layer, softmax attention or
gated-delta, with the exact shapes that its cache would hold. They come from the
caches that the model makes for itself and from the shapes of a forward pass
that is built but never evaluated, not from index arithmetic on the config. A
layer that keeps anything else is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.errors import UnsupportedServingError

# Two modules, one recurrence: state [Hv, Dv, Dk] in float32 and a convolution tail.
GATED_DELTA_MODULES = frozenset(
    {
        ("mlx_lm.models.qwen3_5", "GatedDeltaNet"),
        ("mlx_lm.models.qwen3_next", "Qwen3NextGatedDeltaNet"),
    }
)


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Softmax attention: keys and values ``[kv_heads, tokens, head_dim]`` each."""

    index: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """Gated-delta attention: convolution tail ``[k-1, C]``, state ``[Hv, Dv, Dk]``."""

    index: int
    conv_shape: tuple[int, ...]
    conv_dtype: mx.Dtype
    state_shape: tuple[int, ...]
    state_dtype: mx.Dtype


Layer = AttentionLayer | LinearLayer


def describe(model: nn.Module) -> list[Layer]:
    """Describe every layer of ``model``.

    Raises:
        UnsupportedServingError: a layer keeps something that the pools cannot hold.
    """
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    # Two tokens: enough for every cache to be filled, too few to be masked away.
    model(mx.zeros((1, 2), dtype=mx.int32), cache=caches)
    return [
        _describe_one(index, layer, cache)
        for index, (layer, cache) in enumerate(zip(model.layers, caches, strict=True))
    ]


def _describe_one(index: int, layer: nn.Module, cache: Any) -> Layer:
    from mlx_lm.models.cache import ArraysCache, KVCache

    where = f"layer {index} ({type(layer).__module__}.{type(layer).__name__})"
    if type(cache) is KVCache and cache.keys is not None:
        _, heads, _, dim = cache.keys.shape
        if cache.values.shape[1] != heads or cache.values.shape[3] != dim:
            raise UnsupportedServingError(
                f"The embedded MLX backend cannot serve {where}: its keys {cache.keys.shape} and "
                f"values {cache.values.shape} differ in shape (latent attention); use mlx-lm's "
                "own server for this model."
            )
        return AttentionLayer(index, heads, dim, cache.keys.dtype)
    if type(cache) is ArraysCache and _has_gated_delta(layer):
        conv, state = cache.cache
        return LinearLayer(index, conv.shape[1:], conv.dtype, state.shape[1:], state.dtype)
    raise UnsupportedServingError(
        f"The embedded MLX backend cannot serve {where}: it keeps a {type(cache).__name__}, and "
        "only full softmax attention and gated-delta attention have paged storage; use mlx-lm's "
        "own server for this model."
    )


def _has_gated_delta(layer: nn.Module) -> bool:
    return any(
        (type(child).__module__, type(child).__name__) in GATED_DELTA_MODULES
        for child in layer.children().values()
        if isinstance(child, nn.Module)
    )
