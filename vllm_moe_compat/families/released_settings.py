"""Settings of published configs that neither transformers' classes nor mlx-lm's modules read.

The values here are those that the modules compute anyway. ``check_settings`` warns of another
value, and of any setting that is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ANY = None
"""The setting changes no number, whatever its value."""
RELEASED: Mapping[str, tuple[Any, ...] | None] = {
    # Qwen3.5: positions of images; a gate in every attention; states in float32.
    "rope_parameters.mrope_interleaved": ANY,
    "rope_parameters.mrope_section": ANY,
    "attn_output_gate": (True,),
    "mamba_ssm_dtype": ("float32",),
    # gpt-oss: num_experts_per_tok and the original length under other names.
    "experts_per_token": ANY,
    "initial_context_length": ANY,
    # MiniMax-M2: settings of the MiniMax before it, and prediction heads.
    "layernorm_full_attention_beta": (1, 1.0),
    "layernorm_linear_attention_beta": (1, 1.0),
    "layernorm_mlp_beta": (1, 1.0),
    "mlp_intermediate_size": ANY,
    "num_mtp_modules": ANY,
    "qk_norm_type": ("per_layer",),
    "shared_moe_mode": ANY,
    "use_mtp": ANY,
    "use_routing_bias": (True,),
    # ERNIE 4.5: the router of the training code.
    "moe_gate": ("topk",),
    # Gemma and Llama 4: transformers' caches, and a tool's mark.
    "cache_implementation": ANY,
    "for_llm_compressor": ANY,
}


def is_released(name: str, value: Any) -> bool:
    """Whether a published setting has a value that the modules compute anyway."""
    if name == "attn_type_list":  # MiniMax-M2: 1 is full attention.
        return isinstance(value, list) and all(kind == 1 for kind in value)
    values = RELEASED.get(name, ())
    return values is ANY or value in values
