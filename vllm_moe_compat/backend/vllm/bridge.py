"""Where vLLM expects hardware that is not there, and where its releases differ.

The only file that knows which vLLM is installed. What differs is found by looking
at the thing itself (a field, a parameter), not at a version number: vllm-metal and
nightlies number theirs as they like. Each function says what vLLM does, why that
matters here, and when the function, or a branch of it, can go.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import multiprocessing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.log import logger
from vllm_moe_compat.tested import TESTED
from vllm_moe_compat.versions import judge

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@functools.cache
def warn_outside_tested_range() -> None:
    """Say once, in the process that vLLM was started as, if this vLLM is an unknown one."""
    if multiprocessing.parent_process() is not None:
        return
    version = importlib.metadata.version("vllm")
    if judge(version, TESTED["vllm"]) == "out of range":
        logger.warning(
            "vLLM %s is outside the range that the embedded MLX backend is tested with (%s). "
            "Expect it to work, or to fail while it starts, by a missing name or argument: the "
            "self-check at start compares its logits with mlx-lm's, so wrong tokens are unlikely. "
            "If it fails, use a vLLM of that range.",
            version,
            TESTED["vllm"],
        )


def allow_shutdown_without_accelerator() -> None:
    """Let vLLM's shutdown finish on a host without a torch accelerator.

    ``cleanup_dist_env_and_memory`` empties the accelerator's cache on every
    platform but its own CPU one, and torch raises where there is none, so the
    engine process ended with a traceback. Remove when vLLM asks
    ``torch.accelerator.is_available()`` first.
    """
    if torch.accelerator.is_available():
        return

    def nothing_to_empty() -> None:
        """There is no accelerator, so there is no cache."""

    torch.accelerator.empty_cache = nothing_to_empty
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache = nothing_to_empty


def allow_one_head_size_for_all_layers() -> None:
    """Let vLLM 0.27 ask a Gemma 4 config for its head size; idempotent.

    Under the transformers of today such a config refuses, since the size varies by
    layer, unless it is told that the caller knows. vLLM 0.27 knows (it takes the
    larger one) and cannot say so. Remove when 0.27 leaves the tested range.
    """
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    gemma = convertors.Gemma4ModelArchConfigConvertor
    ask = vars(gemma).get("get_head_size")
    if ask is None or hasattr(ask, "__wrapped__"):
        return

    @functools.wraps(ask)
    def ask_knowingly(self: Any) -> int:
        self.hf_text_config.allow_global_per_layer_attribute_access = True
        size: int = ask(self)
        return size

    gemma.get_head_size = ask_knowingly


def layers_by_region(config: KVCacheConfig) -> list[list[str]]:
    """Names of layers, together where vLLM planned the same pages for them.

    vLLM 0.27 lists the layers that share a tensor. 0.32 gives a tensor's layers
    an address each, and layers at the same address alias each other.

    Raises:
        UnsupportedServingError: a vLLM that says it in a third way.
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
    """See that the longest sequence fits the blocks that can be given away.

    vLLM keeps one block for itself. 0.27 plans as though it did not, and a request
    that needs all blocks then waits for ever. Where vLLM fitted the length to the
    memory it is lowered here, before the scheduler is made. 0.32 counts right, and
    finds nothing to do here. Remove when 0.27 leaves the tested range.

    Raises:
        UnsupportedServingError: the length was asked for and does not fit.
    """
    model = vllm_config.model_config
    asked, usable = model.max_model_len, config.num_blocks - 1
    if not config.kv_cache_groups or _blocks_of_longest(vllm_config, config) <= usable:
        return
    fits, beyond = 0, asked
    while beyond - fits > 1:
        model.max_model_len = (fits + beyond) // 2
        if _blocks_of_longest(vllm_config, config) <= usable:
            fits = model.max_model_len
        else:
            beyond = model.max_model_len
    model.max_model_len = asked
    if not fits or model.original_max_model_len != -1:
        raise UnsupportedServingError(
            f"A sequence of {asked} tokens needs {_blocks_of_longest(vllm_config, config)} blocks "
            f"of the KV cache and {usable} can be given away, enough for {fits} tokens; lower "
            "--max-model-len, or give the cache more memory."
        )
    model.max_model_len = fits
    logger.info("--max-model-len lowered to %d: one block is vLLM's own", fits)


def _blocks_of_longest(vllm_config: VllmConfig, config: KVCacheConfig) -> int:
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    return sum(
        -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes) for spec in specs
    )


def batch_blocks(block_sizes: Sequence[int]) -> dict[str, Any]:
    """Arguments of vLLM's ``InputBatch`` about blocks, one table entry per group.

    Up to 0.31 it also asks for the block sizes of attention kernels. Which
    blocks it notes does not matter here: pages are addressed by the backend.
    """
    from vllm.v1.worker.gpu_input_batch import InputBatch

    sizes = list(block_sizes)
    arguments = {"block_sizes": sizes, "max_num_blocks_per_req": [1] * len(sizes)}
    if "kernel_block_sizes" in inspect.signature(InputBatch).parameters:
        arguments["kernel_block_sizes"] = sizes
    return arguments
