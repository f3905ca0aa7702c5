"""Differences between vLLM's releases in their plans of KV caches; see ``bridge``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


def layer_spec(group_spec: KVCacheSpec, layer_name: str) -> KVCacheSpec:
    """Return the spec of one layer of a group.

    Layers that differ only in shape may share a group, whose spec then holds one per layer.
    """
    return getattr(group_spec, "kv_cache_specs", {}).get(layer_name, group_spec)


def layers_by_region(config: KVCacheConfig) -> list[list[str]]:
    """Return the names of layers, grouped by the memory region that vLLM planned for them.

    vLLM 0.27 lists the layers that share a tensor. 0.32 assigns an address to each layer of a
    tensor, and layers with equal addresses alias each other.

    Raises:
        UnsupportedServingError: the tensors have neither form.
    """
    regions: dict[int, list[str]] = {}
    for number, tensor in enumerate(config.kv_cache_tensors):
        if hasattr(tensor, "layer_stride"):
            for position, name in enumerate(tensor.layers):
                address = tensor.offset + position * tensor.layer_stride
                regions.setdefault(address, []).append(name)
        elif hasattr(tensor, "shared_by"):
            regions[number] = list(tensor.shared_by)
        else:
            raise UnsupportedServingError(
                f"The embedded MLX backend does not understand vLLM's {type(tensor).__name__}: "
                "it has neither layer_stride nor shared_by; use a vLLM of the tested range."
            )
    return list(regions.values())


def leave_room_for_the_null_block(vllm_config: VllmConfig, config: KVCacheConfig) -> None:
    """Ensure that the longest sequence fits the blocks that can be assigned.

    vLLM keeps one block for itself. 0.27 does not count it, and a request that needs all blocks
    then waits forever. If vLLM had fitted the length to the memory, it is lowered here, before
    the scheduler is made. 0.32 counts correctly, and nothing is changed. Remove when 0.27 leaves
    the tested range.

    Raises:
        UnsupportedServingError: the length was set explicitly and does not fit.
    """
    model = vllm_config.model_config
    requested, usable = model.max_model_len, config.num_blocks - 1
    if not config.kv_cache_groups or _blocks_of_longest(vllm_config, config) <= usable:
        return
    # Bisection: ``fits`` tokens fit, ``too_long`` tokens do not.
    fits, too_long = 0, requested
    while too_long - fits > 1:
        model.max_model_len = (fits + too_long) // 2
        if _blocks_of_longest(vllm_config, config) <= usable:
            fits = model.max_model_len
        else:
            too_long = model.max_model_len
    model.max_model_len = requested
    if not fits or model.original_max_model_len != -1:
        raise UnsupportedServingError(
            f"A sequence of {requested} tokens needs {_blocks_of_longest(vllm_config, config)} "
            f"blocks of the KV cache and {usable} can be assigned, enough for {fits} tokens; lower "
            "--max-model-len, or give the cache more memory."
        )
    model.max_model_len = fits
    logger.info("--max-model-len lowered to %d, since vLLM reserves one block", fits)


def _blocks_of_longest(vllm_config: VllmConfig, config: KVCacheConfig) -> int:
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    return sum(
        -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes) for spec in specs
    )
