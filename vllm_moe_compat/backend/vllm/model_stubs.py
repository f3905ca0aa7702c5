"""Stubs that replace vLLM's torch model and quantisation classes in its registries.

vLLM resolves an architecture to a torch class before anything is loaded, to learn whether the
model generates text, is hybrid or is multimodal. Its own classes need kernels or vision libraries
that are absent here, and they would never run, since mlx-lm executes the model. So the
architectures that the embedded backend serves are registered with stubs that answer only those
questions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

from vllm_moe_compat.backend.vllm import architectures, bridge, bridge_speculation, speculation


class MlxCausalLM(nn.Module):
    """Stub of a text generation model; mlx-lm executes the model."""

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        raise NotImplementedError("mlx-lm executes this model; its torch class is a stub")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Part of vLLM's text generation protocol."""
        raise NotImplementedError

    supports_pp = True

    def make_empty_intermediate_tensors(self, *_: Any, **__: Any) -> Any:
        """Part of vLLM's pipeline protocol; results of layers go through MLX's group."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
    ) -> torch.Tensor:
        """Part of vLLM's text generation protocol."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Part of vLLM's text generation protocol."""
        raise NotImplementedError


class MlxHybridCausalLM(MlxCausalLM):
    """Stub of a model with states of fixed size, for which vLLM plans pages beside KV pages.

    The worker takes the real shapes from the loaded model. The shapes given here only keep vLLM
    from choosing page sizes before that.
    """

    is_hybrid = True
    has_inner_state = True

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Return the smallest possible state of one sequence."""
        return ((1,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the state's arrays."""
        return (vllm_config.model_config.dtype,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """Part of vLLM's hybrid protocol; unused, since our worker copies states itself."""
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()


class MlxGatedDeltaCausalLM(MlxHybridCausalLM):
    """Stub of a model with gated-delta layers, whose config contains the shapes."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the convolution and recurrent states of one sequence."""
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
        """Return the model's dtype for the convolution and float32 for the recurrence."""
        dtypes: tuple[torch.dtype, ...] = MambaStateDtypeCalculator.gated_delta_net_state_dtype(
            vllm_config.model_config.dtype, "auto", "float32"
        )
        return dtypes


class DequantizedConfig(QuantizationConfig):
    """Quantisation config that restricts neither dtype nor device.

    The load plan dequantises the weights or keeps them packed; vLLM never sees them.
    """

    method = "fp8"

    def __init__(self, config: Mapping[str, Any] = bridge.NO_QUANTIZATION_CONFIG) -> None:
        super().__init__()
        self.config = config or {}

    def get_name(self) -> Any:
        """Return the name of the method in the checkpoint's config."""
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return all dtypes that MLX computes in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: no CUDA device is required."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: config.json is enough."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DequantizedConfig:
        """Part of vLLM's protocol."""
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> None:
        """Return None: no torch layer is ever built."""
        return


METHODS = (
    *("fp8", "fbgemm_fp8", "mxfp8", "compressed-tensors", "quark"),
    *("modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8"),
    *("awq", "auto_awq", "awq_marlin", "gptq", "auto_gptq", "gptq_marlin"),
    *("auto-round", "inc", "moe_wna16"),
    *("mxfp4", "gpt_oss_mxfp4", "mlx"),
)
"""Methods of checkpoints that this package or mlx-lm reads, and vLLM's own names for them.

vLLM resolves ``modelopt`` with NVFP4 to ``modelopt_fp4``, ``awq`` to the kernels of its choice,
GPT-OSS to ``gpt_oss_mxfp4``; each class may claim a checkpoint of another name. ``mlx`` is the
format of mlx-community, which names no method.
"""


def config_class(method: str) -> type[DequantizedConfig]:
    """Return the config class of a method.

    It is an attribute of this module, since vLLM pickles configs for the processes it spawns.
    """
    name = f"{re.sub('[^0-9a-z]+', ' ', method).title().replace(' ', '')}Config"
    if name not in globals():
        fields = {"method": method, "__module__": __name__}
        globals()[name] = type(name, (DequantizedConfig,), fields)
    found: type[DequantizedConfig] = globals()[name]
    return found


for _method in METHODS:
    config_class(_method)


def register() -> None:
    """Register the stubs; idempotent."""
    bridge.allow_one_head_size_for_all_layers()
    bridge.run_one_batch_of_a_pipeline()
    bridge_speculation.check_before_vllm(speculation.refusal, speculation.no_heads)
    bridge_speculation.read_heads_of_text_configs()
    bridge_speculation.accept_all_parameters()
    bridge_speculation.drop_tokens_behind_stop_strings()
    for method in METHODS:
        register_quantization_config(method)(config_class(method))
    for names, stub in (
        (architectures.PLAIN, MlxCausalLM),
        (architectures.HEADS, MlxCausalLM),
        (architectures.STATEFUL, MlxHybridCausalLM),
        (architectures.GATED_DELTA, MlxGatedDeltaCausalLM),
    ):
        for architecture in names:
            ModelRegistry.register_model(architecture, stub)
