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

PLAIN_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "OlmoeForCausalLM",
)
HYBRID_ARCHITECTURES = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
)


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
    """One with gated-delta layers: vLLM then plans state pages besides KV pages."""

    is_hybrid = True
    has_inner_state = True

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

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """Part of vLLM's hybrid protocol; our worker copies states itself."""
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()


class DequantizedConfig(QuantizationConfig):
    """How vLLM sees a quantised checkpoint: its weights are none of vLLM's business.

    mlx-lm and our load plan dequantise or keep them; as far as vLLM is
    concerned they confine neither the dtype nor the device.
    """

    method = "fp8"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config

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


class MlxQuantizedConfig(DequantizedConfig):
    """The form of mlx-community: ``{"group_size": 64, "bits": 4}``, without a method."""

    method = "mlx"


def register() -> None:
    """Register the stand-ins; a second call replaces them with the same."""
    register_quantization_config("fp8")(DequantizedConfig)
    register_quantization_config("mlx")(MlxQuantizedConfig)
    for architectures, stand_in in (
        (PLAIN_ARCHITECTURES, MlxCausalLM),
        (HYBRID_ARCHITECTURES, MlxHybridCausalLM),
    ):
        for architecture in architectures:
            ModelRegistry.register_model(architecture, stand_in)
