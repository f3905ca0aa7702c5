"""Stand-ins for vLLM's torch model classes.

vLLM resolves an architecture to a torch class before anything is loaded, to
learn whether the model generates text, is hybrid, is multimodal. Its own
classes need kernels or vision libraries that are absent here, and they would
never run: mlx-lm's do. So the architectures that the embedded backend serves
are registered with small classes that answer those questions and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models import ModelRegistry

from vllm_moe_compat.backend.vllm import architectures
from vllm_moe_compat.backend.vllm import bridge as vllm_bridge


class MlxCausalLM(nn.Module):
    """A text generation model that mlx-lm executes; never run as torch."""

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        raise NotImplementedError("mlx-lm executes this model; its torch class is a name only")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Part of vLLM's text generation protocol."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Part of vLLM's text generation protocol."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Part of vLLM's text generation protocol."""
        raise NotImplementedError


class MlxHybridCausalLM(MlxCausalLM):
    """One with states of fixed size: vLLM then plans pages for them besides KV pages.

    Their real shapes come from the loaded model, in the worker; what is said here
    only keeps vLLM from sizing pages by itself before that.
    """

    is_hybrid = True
    has_inner_state = True

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of one sequence's state: the least."""
        return ((1,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return (vllm_config.model_config.dtype,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """Part of vLLM's hybrid protocol; our worker copies states itself."""
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()


class MlxGatedDeltaCausalLM(MlxHybridCausalLM):
    """One with gated-delta layers, whose config says the shapes."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of the convolution and the recurrent state, one sequence's."""
        text = vllm_config.model_config.hf_text_config
        shapes: tuple[tuple[int, ...], ...] = MambaStateShapeCalculator.gated_delta_net_state_shape(
            1,
            text.linear_num_key_heads,
            text.linear_num_value_heads,
            text.linear_key_head_dim,
            text.linear_value_head_dim,
            text.linear_conv_kernel_dim,
            0,
        )
        return shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """Their dtypes: the model's for the convolution, float32 for the recurrence."""
        dtypes: tuple[torch.dtype, ...] = MambaStateDtypeCalculator.gated_delta_net_state_dtype(
            vllm_config.model_config.dtype, "auto", "float32"
        )
        return dtypes


class DequantizedConfig(QuantizationConfig):
    """How vLLM sees a quantised checkpoint: its weights are none of vLLM's business.

    mlx-lm and our load plan dequantise or keep them; as far as vLLM is
    concerned they confine neither the dtype nor the device.
    """

    method = "fp8"

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        # vLLM 0.27 asks for --quantization on a checkpoint without such a config.
        super().__init__()
        self.config = config or {}

    def get_name(self) -> Any:
        """The method's name in the checkpoint's config."""
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that MLX computes in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """No CUDA device is asked for."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file besides config.json is needed."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DequantizedConfig:
        """Part of vLLM's protocol."""
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> None:
        """No torch layer is ever built."""
        return


class CompressedTensorsConfig(DequantizedConfig):
    """FP8 as llm-compressor writes it; what else it writes, mlx-lm packs or refuses."""

    method = "compressed-tensors"


class ModelOptConfig(DequantizedConfig):
    """FP8, and NVFP4, as NVIDIA's ModelOpt writes them."""

    method = "modelopt"


class MlxQuantizedConfig(DequantizedConfig):
    """The form of mlx-community: ``{"group_size": 64, "bits": 4}``, without a method."""

    method = "mlx"


class Mxfp4Config(DequantizedConfig):
    """The form in which GPT-OSS is published; mlx-lm keeps it packed."""

    method = "mxfp4"


class GptOssMxfp4Config(Mxfp4Config):
    """The same under the name that vLLM gives it for GPT-OSS."""

    method = "gpt_oss_mxfp4"


def register() -> None:
    """Register the stand-ins; a second call replaces them with the same."""
    vllm_bridge.allow_one_head_size_for_all_layers()
    for config in (
        DequantizedConfig,
        CompressedTensorsConfig,
        ModelOptConfig,
        MlxQuantizedConfig,
        Mxfp4Config,
        GptOssMxfp4Config,
    ):
        register_quantization_config(config.method)(config)
    for names, stand_in in (
        (architectures.PLAIN, MlxCausalLM),
        (architectures.STATEFUL, MlxHybridCausalLM),
        (architectures.GATED_DELTA, MlxGatedDeltaCausalLM),
    ):
        for architecture in names:
            ModelRegistry.register_model(architecture, stand_in)
