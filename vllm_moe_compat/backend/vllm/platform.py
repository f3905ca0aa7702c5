"""vLLM's view of the machine when the embedded MLX backend serves.

In: the configuration that the command line gave. Out: the same configuration
with our worker in it, everything that belongs to other hardware switched off,
and a named refusal for what the backend does not do. This runs in the front-end
process too, and before forks: it never imports mlx.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING, Any

import psutil
import torch
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_moe_compat.backend.vllm import bridge as vllm_bridge
from vllm_moe_compat.backend.vllm import refusals
from vllm_moe_compat.errors import UnsupportedServingError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER_CLASS = "vllm_moe_compat.backend.vllm.worker.MlxWorker"


def mlx_device() -> str:
    """Which device MLX will compute on: ``metal``, ``cuda`` or ``cpu``.

    Read off the installed distributions, since asking MLX itself would
    initialise it in a process that may be forked later.
    """
    if sys.platform == "darwin":
        return "metal"
    for name in ("mlx-cuda-13", "mlx-cuda-12", "mlx-cuda"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "cuda"
    return "cpu"


class MlxPlatform(Platform):
    """The platform class that ``vllm_moe_compat.plugin.platform`` names."""

    _enum = PlatformEnum.OOT
    device_name = "mlx"
    # vLLM's own tensors (sampling) live on the host; MLX holds the rest.
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    device_control_env_var = "VLLM_MOE_COMPAT_NO_DEVICE_CONTROL"
    simple_compile_backend = "eager"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """What ``--dtype auto`` may choose; an explicit dtype is not held to it.

        On the CPU float32 alone: its ``gather_mm`` (the experts) has no other,
        and half precision gains nothing there (matrix products measured at 1.0
        to 1.1 times float32's time in bfloat16, 1.3 to 1.5 in float16).
        """
        if mlx_device() == "cpu":
            return [torch.float32]
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """``mlx (cpu)`` and the like."""
        return f"mlx ({mlx_device()})"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Bytes of the host's memory, which MLX shares on the CPU and on Metal."""
        return int(psutil.virtual_memory().total)

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """No second memory to copy to."""
        return False

    @classmethod
    def inference_mode(cls) -> Any:
        """Sampling needs no gradients."""
        return torch.no_grad()

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Nothing to select: MLX has its default device."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """VLLM's sampler draws from torch's CPU generator, seeded with torch's own call."""
        torch.manual_seed(seed)

    @classmethod
    def import_kernels(cls) -> None:
        """There are no torch kernels to import."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """There are no torch kernels to import."""

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """KV pages and state pages side by side."""
        return True

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        """CUDA graphs are not ours."""
        return False

    @classmethod
    def use_custom_allreduce(cls) -> bool:
        """One device."""
        return False

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """Accept any: what mlx-lm and the load plan cannot read is refused when loading."""

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
        """Put our worker in and refuse what the backend does not do; idempotent.

        Raises:
            UnsupportedServingError: a setting that the backend cannot honour.
        """
        from vllm import envs

        vllm_bridge.warn_outside_tested_range()
        if envs.VLLM_USE_V2_MODEL_RUNNER:
            raise UnsupportedServingError(
                "The embedded MLX backend cannot serve with VLLM_USE_V2_MODEL_RUNNER=1: it reads "
                "the step encoding of vLLM's V1 model runner; unset it."
            )
        # Unset, vLLM would choose by what is installed and by the model.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        # A fork after MLX has evaluated anything hangs. A process that never
        # imported it may fork, as vLLM does by default: scripts need no main guard.
        if "mlx.core" in sys.modules:
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        refusal = refusals.first(vllm_config)
        if refusal:
            raise UnsupportedServingError(f"The embedded MLX backend cannot serve with {refusal}")
        cls.apply_config_platform_defaults(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == "auto":
            parallel.worker_cls = WORKER_CLASS
        parallel.distributed_executor_backend = "uni"

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: VllmConfig) -> None:
        """Leave it: our worker sets the block size when it has seen the model's layers."""

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Refuse, per request, what the backend does not do.

        Raises:
            UnsupportedServingError: embeddings or images as input, or a pooling request.
        """
        from vllm import SamplingParams

        if not isinstance(params, SamplingParams):
            raise UnsupportedServingError(
                "The embedded MLX backend generates text; pooling requests are not served."
            )
        kind = processed_inputs.get("type") if hasattr(processed_inputs, "get") else None
        if kind not in (None, "token"):
            raise UnsupportedServingError(
                f"The embedded MLX backend takes text or token ids; {kind!r} input is not served."
            )
