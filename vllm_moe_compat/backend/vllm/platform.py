"""vLLM's platform class for the embedded MLX backend.

It enters our worker into vLLM's configuration, switches off features of other hardware, and
refuses settings and requests that the backend does not support. It also runs in the front-end
process and before forks, so it never imports mlx.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import psutil
import torch
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_moe_compat.backend.model.rows import TokenRows
from vllm_moe_compat.backend.vllm import (
    bridge,
    data_parallel,
    refusals,
    request_checks,
    speculation,
    token_rows,
)
from vllm_moe_compat.backend.vllm.front_end_stats import log_expert_cache
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.plan.serving import installed_device

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

WORKER_CLASS = "vllm_moe_compat.backend.vllm.worker.MlxWorker"
SCHEDULER = "vllm_moe_compat.backend.vllm.scheduler.MlxScheduler"
EXECUTOR = "vllm_moe_compat.backend.vllm.executor.MlxExecutor"
ASYNC_SCHEDULER = "vllm_moe_compat.backend.vllm.scheduler.MlxAsyncScheduler"


class MlxPlatform(Platform):
    """The platform class that ``vllm_moe_compat.plugin.platform`` names."""

    _enum = PlatformEnum.OOT
    # A device of torch: vLLM makes one of it for each of its process groups.
    device_name = "cpu"
    # vLLM's own tensors (sampling) are on the host; everything else is in MLX arrays.
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    device_control_env_var = "VLLM_MOE_COMPAT_NO_DEVICE_CONTROL"
    simple_compile_backend = "eager"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """Dtypes that ``--dtype auto`` may choose; an explicit dtype is not limited to them.

        On the CPU only float32: MLX's ``gather_mm`` (the experts) supports no other dtype there,
        and half precision gains nothing (matrix products took 1.0 to 1.1 times float32's time in
        bfloat16, 1.3 to 1.5 times in float16).
        """
        if installed_device() == "cpu":
            return [torch.float32]
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Return a name such as ``mlx (cpu)``."""
        return f"mlx ({installed_device()})"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Return the bytes of the host's memory, which MLX shares on the CPU and on Metal."""
        return int(psutil.virtual_memory().total)

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """Return False: there is no device memory to copy to."""
        return False

    def is_sleep_mode_available(self) -> bool:
        """Return True: weights and pages can be given back, and made again."""
        return True

    @classmethod
    def inference_mode(cls) -> Any:
        """Return a context without gradients, for sampling."""
        return torch.no_grad()

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Do nothing: MLX uses its default device."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """Seed torch's CPU generator, which vLLM's sampler uses."""
        torch.manual_seed(seed)

    @classmethod
    def import_kernels(cls) -> None:
        """Do nothing: there are no torch kernels."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """Do nothing: there are no torch kernels."""

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """Return True: KV pages and state pages exist side by side."""
        return True

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        """Return False: there are no CUDA graphs."""
        return False

    @classmethod
    def use_custom_allreduce(cls) -> bool:
        """Return False: there is one device."""
        return False

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """Accept any method; unreadable checkpoints are refused when they are loaded."""

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: VllmConfig) -> None:
        """Switch torch compilation and CUDA graphs off before defaults are derived."""
        from vllm.config import CompilationMode, CUDAGraphMode

        compilation = vllm_config.compilation_config
        compilation.mode = CompilationMode.NONE
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        compilation.cudagraph_capture_sizes = []

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Enter our worker and refuse unsupported settings; idempotent.

        Raises:
            UnsupportedServingError: a setting is not supported.
        """
        from vllm import envs

        bridge.warn_outside_tested_range()
        if envs.VLLM_USE_V2_MODEL_RUNNER:
            raise UnsupportedServingError(
                "The embedded MLX backend cannot serve with VLLM_USE_V2_MODEL_RUNNER=1: it reads "
                "the step encoding of vLLM's V1 model runner; unset it."
            )
        # If it is unset, vLLM selects a runner by installed packages and by model.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        # A fork hangs once MLX has evaluated anything. A process that never imported MLX may
        # fork, which is vLLM's default and requires no main guard in scripts.
        if "mlx.core" in sys.modules:
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        bridge.remember_facts_of_engines(_facts_of_engine)
        log_expert_cache(vllm_config)
        refusal = refusals.first(vllm_config)
        if refusal:
            raise UnsupportedServingError(f"The embedded MLX backend cannot serve with {refusal}")
        data_parallel.settle(vllm_config)
        speculation.settle(vllm_config)
        cls.apply_config_platform_defaults(vllm_config)
        bridge.mark_default_memory_share(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == "auto":
            parallel.worker_cls = WORKER_CLASS
        parallel.distributed_executor_backend = "uni" if parallel.world_size == 1 else EXECUTOR
        scheduler = vllm_config.scheduler_config
        scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: VllmConfig) -> None:
        """Do nothing: our worker sets the block size when the model's layers are known."""

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Refuse requests that the backend does not support or cannot compute.

        Raises:
            InvalidRequestError: embeddings or images as input, a pooling request, or a fault that
                ``request_checks`` finds.
        """
        from vllm import SamplingParams

        from vllm_moe_compat.backend.vllm.invalid_request import InvalidRequestError

        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                "The embedded MLX backend generates text; pooling requests are not served."
            )
        kind = bridge.input_kind(processed_inputs)
        if kind not in (None, "token"):
            raise InvalidRequestError(
                f"The embedded MLX backend takes text or token ids; {kind!r} input is not served."
            )
        rows = bridge.facts_of_engine()
        fault = rows and request_checks.first_fault(
            bridge.prompt_ids(processed_inputs), params, rows
        )
        if fault:
            raise InvalidRequestError(fault)


def _facts_of_engine(model_config: ModelConfig, tokenizer: Any) -> TokenRows:
    """Return the ids that the engine's model has rows for; warn of a larger tokenizer."""
    rows = token_rows.of_checkpoint(model_config)
    token_rows.warn_of_larger_tokenizer(rows, tokenizer)
    return rows
