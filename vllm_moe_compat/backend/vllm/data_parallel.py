"""``--data-parallel-size N``: N independent engines behind vLLM's front end.

Each engine has the whole model, its own pages and its own scheduler; vLLM's front end divides the
requests among them. For a Mixture-of-Experts model vLLM would couple the engines instead: they
step in lockstep, and idle ones compute dummy batches, since on other platforms the experts of all
engines are one pool. Here each engine computes its own experts, so vLLM is told that the model has
none, which makes it treat the engines as it treats those of a dense model.

The engines of a machine share its memory. What each may take is agreed between them
(``local_engines.py``); the names of the agreement travel in vLLM's ``additional_config``, since an
engine's own ``parallel_config`` says nothing of the others.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_KEY = "vllm_moe_compat_data_parallel"


def settle(vllm_config: VllmConfig) -> None:
    """Make the engines independent, and let those of this machine know of each other; idempotent.

    To be called after vLLM has derived the model's settings, and before any engine starts.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if parallel.data_parallel_size <= 1 or model is None:
        return
    model.model_arch_config.num_experts = 0
    parallel.is_moe_model = False
    local = parallel.data_parallel_size_local
    if local > 1:
        agreement = {"name": uuid.uuid4().hex, "engines": local}
        vllm_config.additional_config.setdefault(_KEY, agreement)


def local_engines(vllm_config: VllmConfig) -> tuple[str, int]:
    """Return the name that the engines of this machine share, and their number."""
    extra: Any = vllm_config.additional_config
    found = extra.get(_KEY) if isinstance(extra, dict) else None
    return (found["name"], found["engines"]) if found else ("", 1)


def refused(vllm_config: VllmConfig) -> Iterator[tuple[Any, str]]:
    """Yield whether each unsupported setting is set, and its message."""
    from vllm import envs

    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size <= 1:
        return
    yield (
        envs.VLLM_DP_SIZE > 1,
        "VLLM_DP_SIZE: engines are independent, so each process can have an LLM by itself; leave "
        "VLLM_DP_SIZE and its like out, and divide the prompts.",
    )
    yield (
        parallel.data_parallel_backend != "mp",
        f"--data-parallel-backend {parallel.data_parallel_backend}; leave it at mp.",
    )
    yield (
        parallel.data_parallel_external_lb,
        "--data-parallel-rank or --data-parallel-external-lb: engines are independent, so each "
        "can be a server by itself; start them without --data-parallel options behind your load "
        "balancer.",
    )
    yield (
        parallel.data_parallel_hybrid_lb,
        "--data-parallel-hybrid-lb, or --data-parallel-start-rank without --headless: engines are "
        "independent, so each machine can be a server by itself; start them with "
        "--data-parallel-size for the engines of one machine behind your load balancer.",
    )
    yield (
        not isinstance(vllm_config.additional_config, dict),
        "an additional_config that is no dict, together with --data-parallel-size: the engines of "
        "this machine learn of each other in it.",
    )
    yield (
        parallel.world_size > 1,
        "several engines of several ranks; leave --data-parallel-size or --tensor-parallel-size "
        "at 1.",
    )
    yield (
        vllm_config.observability_config.enable_mfu_metrics,
        "--enable-mfu-metrics together with --data-parallel-size: vLLM is told that the model has "
        "no experts, so its estimate would be wrong; leave it out.",
    )
