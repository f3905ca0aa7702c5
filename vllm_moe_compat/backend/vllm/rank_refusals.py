"""Settings of vLLM about several ranks that the embedded backend does not support.

Tensor and pipeline parallelism are what it has; the rest is refused at start-up by name, since
ignoring it would divide the work in another way than was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_moe_compat.backend.vllm import bridge
from vllm_moe_compat.plan.expert_cache import CacheSetting
from vllm_moe_compat.ranks.expected import cache_refusal

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXECUTORS = (
    None,
    "mp",
    "uni",
    # vLLM checks a configuration again in each of its processes.
    "vllm_moe_compat.backend.vllm.executor.MlxExecutor",
)


def settings(vllm_config: VllmConfig) -> Iterator[tuple[Any, str]]:
    """Yield whether each unsupported setting is set, and its message."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    executor = parallel.distributed_executor_backend
    yield (
        parallel.use_ray,
        "--distributed-executor-backend ray: vLLM places ranks on accelerators that Ray counts, "
        "and MLX's device is none of them; use --nnodes for several machines.",
    )
    yield (
        executor not in EXECUTORS,
        f"--distributed-executor-backend {executor}: it has its own executor; leave it out.",
    )
    yield (
        parallel.enable_expert_parallel,
        "expert parallelism: MLX has no all-to-all; leave --enable-expert-parallel out, and "
        "--tensor-parallel-size divides each expert.",
    )
    yield (
        parallel.enable_eplb or parallel.enable_elastic_ep,
        "a balance of experts between ranks: each rank has a part of every expert; leave "
        "--enable-eplb and --enable-elastic-ep out.",
    )
    yield (
        parallel.pipeline_parallel_size > 1 and parallel.tensor_parallel_size > 1,
        "tensor and pipeline parallelism together: MLX's ring of ranks cannot be divided; leave "
        "one of the sizes at 1.",
    )
    yield (
        bridge.context_parallel_size(vllm_config) > 1,
        "context parallelism: pages of a sequence are on every rank; leave "
        "--prefill-context-parallel-size and --decode-context-parallel-size at 1.",
    )
    yield (
        parallel.enable_dbo or parallel.ubatch_size > 1,
        "batches cut in two; leave --enable-dbo and --ubatch-size out.",
    )
    if parallel.world_size == 1:
        return
    yield (
        bridge.shards_sampling(vllm_config),
        "sampling divided over ranks: every rank has all logits; leave "
        "--enable-batch-sharded-sampling out.",
    )
    yield (
        model is not None and model.enable_sleep_mode,
        "--enable-sleep-mode on several ranks; leave one of both out.",
    )
    yield CacheSetting.read() is not None, cache_refusal()
