"""vLLM's KV cache specs for the layers of a model, and the blocks that a sequence needs.

vLLM assigns blocks to groups of layers that need the same ones. With several groups, a block id
may name a page of any group, so all pages have one size: layers with fewer bytes per token get
longer blocks, and states are padded.

vLLM is told about sliding windows, and then frees the blocks behind them, where that is possible:
there is one window size, no state layer, and the bytes per token divide each other. Otherwise
such layers keep all of their tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer, StateLayer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

PAGE_TOKENS = 16


def torch_dtype(dtype: mx.Dtype) -> torch.dtype:
    """Return torch's dtype of the same name as MLX's."""
    found: torch.dtype = getattr(torch, str(dtype).rpartition(".")[2])
    return found


def _split(layers: Sequence[Layer]) -> tuple[list[AttentionLayer], list[StateLayer]]:
    attention = [layer for layer in layers if isinstance(layer, AttentionLayer)]
    return attention, [layer for layer in layers if isinstance(layer, StateLayer)]


def windows_are_freed(layers: Sequence[Layer]) -> bool:
    """Return whether vLLM is told about sliding windows."""
    attention, states = _split(layers)
    windows = {layer.window for layer in attention} - {None}
    sizes = [layer.token_bytes for layer in attention]
    one_window = len(windows) == 1 and not states
    return one_window and all(max(sizes) % size == 0 for size in sizes)


def align_pages(vllm_config: VllmConfig, layers: Sequence[Layer]) -> None:
    """Set block sizes so that a page of keys and values is large enough for a state.

    The smallest such block has ``16 * ceil(state bytes / (16 * bytes per token))`` tokens.
    """
    cache = vllm_config.cache_config
    attention, states = _split(layers)
    if not states:
        return
    per_token = max(layer.token_bytes for layer in attention)
    largest = max(_state_spec(cache, layer, 1, None).page_size_bytes for layer in states)
    block = PAGE_TOKENS * math.ceil(largest / (PAGE_TOKENS * per_token))
    cache.block_size = max(block, cache.block_size)
    cache.mamba_page_size_padded = cache.block_size * per_token
    aligned = cache.mamba_cache_mode == "align"
    longest = vllm_config.model_config.max_model_len
    cache.mamba_block_size = cache.block_size if aligned else longest


def specs(vllm_config: VllmConfig, layers: Sequence[Layer]) -> dict[int, KVCacheSpec]:
    """Return the spec of each layer by its index."""
    cache = vllm_config.cache_config
    attention, states = _split(layers)
    freed = windows_are_freed(layers)
    several_groups = bool(states) or (freed and any(layer.window is None for layer in attention))
    largest = max(layer.token_bytes for layer in attention)
    found: dict[int, KVCacheSpec] = {}
    for layer in layers:
        if isinstance(layer, StateLayer):
            found[layer.index] = _state_spec(
                cache, layer, cache.mamba_block_size, cache.mamba_page_size_padded
            )
            continue
        shape: dict[str, Any] = {
            "block_size": cache.block_size
            * (largest // layer.token_bytes if several_groups else 1),
            "num_kv_heads": layer.kv_heads,
            "head_size": layer.head_dim,
            "dtype": torch_dtype(layer.dtype),
        }
        if layer.value_dim is not None:
            shape["head_size_v"] = layer.value_dim
        if freed and layer.window is not None:
            found[layer.index] = SlidingWindowSpec(sliding_window=layer.window, **shape)
        else:
            found[layer.index] = FullAttentionSpec(**shape)
    return found


def _state_spec(cache: Any, layer: StateLayer, block: int, padded: int | None) -> MambaSpec:
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    return MambaSpec(
        block_size=block,
        shapes=layer.shapes,
        dtypes=tuple(map(torch_dtype, layer.dtypes)),
        page_size_padded=padded,
        mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
        mamba_cache_mode=cache.mamba_cache_mode,
    )


@dataclass(frozen=True, slots=True)
class Demand:
    """Blocks that one sequence of ``max_model_len`` tokens needs.

    Attributes:
        blocks: number of blocks.
        block_bytes: bytes of one block in all pools together.
        length: tokens of the sequence.
    """

    blocks: int
    block_bytes: int
    length: int

    def sequences(self, num_blocks: int) -> float:
        """Return how many such sequences fit ``num_blocks``, one of which is the null block."""
        return (num_blocks - 1) / self.blocks

    def bytes_for(self, sequences: int) -> int:
        """Return the bytes of pages for ``sequences`` such sequences."""
        return self.block_bytes * (sequences * self.blocks + 1)


def demand(vllm_config: VllmConfig, layers: Sequence[Layer]) -> Demand:
    """Compute the blocks that a sequence of ``max_model_len`` tokens needs.

    With several kinds of layers, vLLM forms groups as large as the rarest kind, or as the most
    common kind if that has less than 1.5 times as many; a block is one page in each layer of a
    group.
    """
    length = vllm_config.model_config.max_model_len
    kinds = Counter(specs(vllm_config, layers).values())
    one_group = len({(type(spec), spec.block_size) for spec in kinds}) == 1 and not any(
        isinstance(spec, MambaSpec) for spec in kinds
    )
    if one_group:
        block_bytes = sum(spec.page_size_bytes * count for spec, count in kinds.items())
        blocks = max(_pages(vllm_config, spec) for spec in kinds)
        return Demand(blocks, block_bytes, length)
    width, most = min(kinds.values()), max(kinds.values())
    if most < 1.5 * width:
        width = most
    blocks = sum(math.ceil(n / width) * _pages(vllm_config, spec) for spec, n in kinds.items())
    return Demand(blocks, width * max(spec.page_size_bytes for spec in kinds), length)


def _pages(vllm_config: VllmConfig, spec: KVCacheSpec) -> int:
    """Return the pages of one layer that a sequence of ``max_model_len`` tokens takes."""
    pages: int = -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
    return pages
