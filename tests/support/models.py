"""Small random checkpoints of families that stock mlx-lm loads by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

# Long enough for prefix-cache tests, short enough for two cores.
_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe of 16 experts": (
        "Qwen3Moe",
        {
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "mistral_windowed": (
        "Mistral",
        {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write(path: Path, family: str, tokenizer_from: Path, dtype: str = "bfloat16") -> Path:
    """Write a random ``family`` model in its hub's form, with a tokenizer, into ``path``."""
    import torch
    import transformers

    name, extra = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**(_COMMON | extra))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Peaked logits: greedy choices that do not hang on the last bit.
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    config_file = path / "config.json"
    written = json.loads(config_file.read_text())
    # As the hub has it, and as stock mlx-lm reads it.
    written["rope_theta"] = written.pop("rope_parameters")["rope_theta"]
    written |= extra
    config_file.write_text(json.dumps(written, indent=2))
    for file in _TOKENIZER:
        if (tokenizer_from / file).exists():
            shutil.copy(tokenizer_from / file, path / file)
    return path


def write_mlx_4bit(path: Path, source: Path) -> Path:
    """Convert ``source`` as mlx-community does: stacked experts, 4 bits, group 64."""
    from mlx_lm.convert import convert

    convert(str(source), str(path), quantize=True, q_bits=4, q_group_size=64)
    return path


# One small random model of each module path, as mlx-lm's own class builds it.
# name: (module, architecture, config besides the common part)
_MLX_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_ROPES = {"sliding_attention": _ROPE, "full_attention": _ROPE}
_GEMMA4 = {
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 512,
    "sliding_window": 24,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}
MODULE_PATHS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    "olmoe": ("olmoe", "OlmoeForCausalLM", {**_EXPERTS, "norm_topk_prob": False}),
    "phimoe": (
        "phimoe",
        "PhiMoEForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 8,
                "short_mscale": 1.0,
                "long_mscale": 1.0,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "granitemoe": (
        "granitemoe",
        "GraniteMoeForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "logits_scaling": 1.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 0.5,
            "attention_bias": False,
        },
    ),
    "dots1": (
        "dots1",
        "Dots1ForCausalLM",
        {**_ROUTED, "scoring_func": "noaux_tc", "layer_types": ["full_attention"] * 4},
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **_ROUTED,
            "rope_scaling": None,
            "use_qk_norm": True,
            "attention_bias": False,
            "partial_rotary_factor": 0.5,
        },
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {
            "use_bias": False,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_num_shared_experts": 1,
        },
    ),
    "minimax_m2": (
        "minimax",
        "MiniMaxM2ForCausalLM",
        {
            "model_type": "minimax_m2",
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "shared_intermediate_size": 0,
            "rotary_dim": 8,
        },
    ),
    "solar_open": (
        "solar_open",
        "SolarOpenForCausalLM",
        {**_ROUTED, "partial_rotary_factor": 1.0},
    ),
    # Windows and sinks.
    "gpt_oss": (
        "gpt_oss",
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "layer_types": _SLIDING,
            "rope_scaling": {"rope_type": "default"},
        },
    ),
    "exaone_moe": (
        "exaone_moe",
        "ExaoneMoeForCausalLM",
        {
            **_EXPERTS,
            "num_shared_experts": 1,
            "sliding_window": 20,
            "layer_types": _SLIDING,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "is_moe_layer": [False, True, True, True],
        },
    ),
    "afmoe": (
        "afmoe",
        "AfmoeForCausalLM",
        {
            **_EXPERTS,
            "layer_types": _SLIDING,
            "sliding_window": 24,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
        },
    ),
    "laguna": (
        "laguna",
        "LagunaForCausalLM",
        {
            **_EXPERTS,
            "sliding_window": 24,
            "layer_types": _SLIDING,
            "shared_expert_intermediate_size": 32,
            "rope_parameters": _ROPES,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
    ),
    "mellum": (
        "mellum",
        "MellumForCausalLM",
        {
            **_EXPERTS,
            "norm_topk_prob": True,
            "sliding_window": 24,
            "layer_types": _SLIDING,
            "rope_parameters": _ROPES,
        },
    ),
    # Heads of different sizes in different layers; then values unlike keys, too.
    "gemma4_text": (
        "gemma4_text",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "gemma4_text, k = v": (
        "gemma4_text",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "gemma4_text, shared keys": (
        "gemma4_text",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "layer_types": _SLIDING,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,  # Another default in transformers.
        },
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        {
            **_ROUTED,
            "hybrid_layer_pattern": [0, 1, 1, 0],
            "layer_types": [_SLIDING[1], *_SLIDING[:1] * 2, _SLIDING[1]],
            "moe_layer_freq": [0, 1, 1, 1],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": 24,
            "sliding_window": 24,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "layernorm_epsilon": 1e-6,
            # What transformers' class has without rope_parameters.
            "rope_theta": 5000000.0,
            "swa_rope_theta": 10000.0,
            "partial_rotary_factor": 0.334,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "v_head_dim": 16,
            "swa_head_dim": 24,
            "swa_v_head_dim": 16,
        },
    ),
    # Chunks.
    "llama4": (
        "llama4",
        "Llama4ForConditionalGeneration",
        {
            "text_config": {
                **_MLX_COMMON,
                "model_type": "llama4_text",
                "attention_bias": False,
                "attention_chunk_size": 32,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 96,
                "num_experts_per_tok": 1,
                "num_local_experts": 4,
                "rope_scaling": None,
                "use_qk_norm": True,
                "attn_temperature_tuning": True,
                "floor_scale": 16,
                "attn_scale": 0.1,
            },
        },
    ),
    # States.
    "lfm2_moe": (
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {
            **_EXPERTS,
            "norm_topk_prob": True,
            "use_expert_bias": True,
            "num_dense_layers": 1,
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "layer_types": ["conv", "full_attention", "conv", "conv"],
            "rope_parameters": _ROPE,
        },
    ),
    "jamba": (
        "jamba",
        "JambaForCausalLM",
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 4,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "mamba_dt_rank": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **_MAMBA2,
            "attention_bias": False,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 0.25,
            "logits_scaling": 1.0,
            "residual_multiplier": 0.5,
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "position_embedding_type": "nope",
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            **_ROUTED,
            "attention_bias": False,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "mamba_proj_bias": False,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "n_groups": 2,
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "hybrid_override_pattern": "ME*EM",
            "num_hidden_layers": 5,
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **_EXPERTS,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [],
            "partial_rotary_factor": 0.5,
            "full_attention_interval": 2,
            "norm_topk_prob": True,
        },
    ),
    # States beside latent attention.
    "kimi_linear": (
        "kimi_linear",
        "KimiLinearForCausalLM",
        {
            "num_key_value_heads": 4,
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "model_max_length": 4096,
            "linear_attn_config": {
                "full_attn_layers": [4],
                "kda_layers": [1, 2, 3],
                "num_heads": 4,
                "head_dim": 16,
                "short_conv_kernel_size": 4,
            },
        },
    ),
    # Two caches in a layer: a state and keys; two latents.
    "falcon_h1": (
        "falcon_h1",
        "FalconH1ForCausalLM",
        {
            **_MAMBA2,
            "mamba_d_ssm": 128,
            "mamba_chunk_size": 16,
            "attention_in_multiplier": 1.0,
            "lm_head_multiplier": 1.0,
            "projectors_bias": False,
        },
    ),
    "longcat_flash": (
        "longcat_flash",
        "LongcatFlashForCausalLM",
        {
            **_LATENT,
            "attention_method": "MLA",
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "zero_expert_type": "identity",
            "routed_scaling_factor": 1.0,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "attention_bias": False,
        },
    ),
    # Latent attention.
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {
            **_ROUTED,
            **_LATENT,
            "topk_method": "greedy",
            "rope_scaling": {
                "type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 2048,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {**_ROUTED, **_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        {**_ROUTED, **_LATENT, "topk_method": "noaux_tc", "num_nextn_predict_layers": 0},
    ),
    "mistral4": (
        "mistral4",
        "Mistral4ForCausalLM",
        {
            **_ROUTED,
            **_LATENT,
            "head_dim": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 256.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}
# Served by mlx-lm, refused by the embedded backend.
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v32": (
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        {
            **_ROUTED,
            **_LATENT,
            "index_head_dim": 16,
            "index_n_heads": 4,
            "index_topk": 16,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
}


def build_mlx(name: str, **other: Any) -> tuple[Any, dict[str, Any]]:
    """Make the random model ``name`` of the tables above, and its config.

    ``other``: settings instead of those of the table.
    """
    import importlib

    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    module, architecture, changes = (MODULE_PATHS | REFUSED)[name]
    config = {**_MLX_COMMON, "model_type": module, "architectures": [architecture], **changes}
    config |= other
    code = importlib.import_module(f"mlx_lm.models.{module}")
    mx.random.seed(7)
    model = code.Model(code.ModelArgs.from_dict(config))

    def peaked(where: str, weight: mx.array) -> mx.array:
        # Choices that do not hang on the last bit; nothing that is zero in all models.
        if not weight.any().item():
            return mx.random.normal(weight.shape) * 0.5
        return weight * 3 if weight.ndim > 1 and "conv" not in where else weight

    model.update(tree_map_with_path(peaked, model.parameters()))
    return model, config


def write_mlx(path: Path, name: str) -> Path:
    """Write the random model ``name`` in the form that mlx-lm saves."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model, config = build_mlx(name)
    weights = dict(tree_flatten(model.parameters()))
    path.mkdir(parents=True)
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def write_gpt_oss_mxfp4(path: Path) -> Path:
    """Write a random GPT-OSS in its hub's form: experts as MXFP4 blocks and scales."""
    import mlx.core as mx

    write_mlx(path, "gpt_oss")
    loaded: Any = mx.load(str(path / "model.safetensors"))
    weights, experts = {}, {}
    for name, weight in loaded.items():
        (experts if ".experts." in name and name.endswith(".weight") else weights)[name] = weight
    for name, weight in experts.items():
        packed, scales = mx.quantize(weight, group_size=32, bits=4, mode="mxfp4")
        blocks = mx.unflatten(packed.view(mx.uint8), -1, (-1, 16))
        experts[name] = {"blocks": blocks, "scales": scales}
    for name in [name for name in experts if "gate_proj" in name]:
        base = name.removesuffix("gate_proj.weight")
        for part in ("blocks", "scales"):
            both = [experts[f"{base}{one}_proj.weight"][part] for one in ("gate", "up")]
            # Rows of both in turn.
            weights[f"{base}gate_up_proj_{part}"] = mx.flatten(mx.stack(both, axis=2), 1, 2)
            weights[f"{base}down_proj_{part}"] = experts[f"{base}down_proj.weight"][part]
        both = [weights.pop(f"{base}{one}_proj.bias") for one in ("gate", "up")]
        weights[f"{base}gate_up_proj_bias"] = mx.flatten(mx.stack(both, axis=2), 1, 2)
        weights[f"{base}down_proj_bias"] = weights.pop(f"{base}down_proj.bias")
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path
