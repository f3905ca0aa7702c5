"""Pools of pages as vLLM planned them: one per memory region, which several groups may share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.vllm import bridge_kv
from vllm_moe_compat.errors import UnsupportedServingError

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_moe_compat.backend.model.loader import ServedModel
    from vllm_moe_compat.backend.vllm.stages import AllLayers


def layer_name(index: int) -> str:
    """Return the name that vLLM is told of a layer."""
    return f"layers.{index}"


def _layer_index(name: str) -> int:
    return int(name.rpartition(".")[2])


def allocate(
    plan: KVCacheConfig,
    served: ServedModel,
    every: AllLayers,
    dtype: mx.Dtype,
    *,
    keep_boundaries: bool,
) -> LayerStorage:
    """Allocate the pages of this rank's layers, and of the prediction heads.

    Args:
        plan: of vLLM.
        served: the model.
        every: the layers that the plan is for.
        dtype: of keys and values.
        keep_boundaries: see ``LayerStorage``.

    Raises:
        UnsupportedServingError: vLLM padded pages that must hold whole tokens.
    """
    # From here on layers have their place among the rank's own, those of heads come last.
    place = {index: number for number, index in enumerate(every.own_paged)}
    groups: dict[int, int] = {}
    page_bytes: dict[int, int] = {}
    block_sizes = []
    for number, group in enumerate(plan.kv_cache_groups):
        block_sizes.append(group.kv_cache_spec.block_size)
        for name in group.layer_names:
            index = place[_layer_index(name)]
            groups[index] = number
            page_bytes[index] = bridge_kv.layer_spec(group.kv_cache_spec, name).page_size_bytes
    _check_pages([*served.layers, *every.heads], block_sizes, groups, page_bytes)
    pools: dict[int, PagePool] = {}
    for names in bridge_kv.layers_by_region(plan):
        indices = [place[_layer_index(name)] for name in names]
        pool = PagePool(plan.num_blocks, page_bytes[indices[0]], dtype)
        pool.allocate()
        pools |= dict.fromkeys(indices, pool)
    heads = None
    if served.heads is not None:
        first = len(served.layers)
        own = served.heads.layers
        heads = LayerStorage(
            own,
            {layer.index: pools[first + layer.index] for layer in own},
            {layer.index: groups[first + layer.index] for layer in own},
            block_sizes,
            keep_boundaries=keep_boundaries,
        )
    own_places = range(len(served.layers))
    return LayerStorage(
        served.layers,
        {index: pools[index] for index in own_places},
        {index: groups[index] for index in own_places},
        block_sizes,
        keep_boundaries=keep_boundaries,
        of_all_ranks=every.layers,
        heads=heads,
    )


def _check_pages(
    layers: Sequence[Layer],
    block_sizes: Sequence[int],
    groups: dict[int, int],
    page_bytes: dict[int, int],
) -> None:
    """Check that pages hold whole tokens and no padding, which addressing relies on.

    Raises:
        UnsupportedServingError: vLLM padded the pages, since the layers differ in shape.
    """
    for place, layer in enumerate(layers):
        if isinstance(layer, AttentionLayer):
            block = block_sizes[groups[place]]
            exact = block * layer.token_bytes
            if exact != page_bytes[place]:
                raise UnsupportedServingError(
                    f"The embedded MLX backend cannot page layer {layer.index}: {block} tokens "
                    f"take {exact} bytes and a page has {page_bytes[place]}, since the model's "
                    "layers differ in shape; use mlx-lm's own server for this model."
                )
