"""The families' published form, made from the form that transformers 5 writes.

Names: transformers reverses its own renaming when it saves, and here and there
that reaches too far. Configurations: mlx-lm reads the keys that releases have,
and those of transformers 4; the parity tests keep both kinds apart, so that a
layout does not fail for its configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from parity.family import VOCAB
from parity.reference import State

Config = dict[str, Any]

RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "kimi_k25": (
        (r"\.model\.blocks\.", ".model.layers."),
        (r"^model\.mm_projector", "mm_projector"),
    ),
    "kimi_linear": ((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
    "minimax_m3_vl": ((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
    "kimi_vl": ((r"^", "language_model."),),
    "olmo_hybrid": (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
}
# The text model is what is published (Step-3.5), or all that the module wants.
DROPPED = {
    "step3p7": r"^(vision_model|vit_large_projector)",
    "muse_glimmer": r"^model\.vision_",
}


def release_names(family: str, state: State) -> State:
    """Return the tensors under the names that releases have."""
    dropped = re.compile(DROPPED.get(family, r"(?!)"))
    result = {}
    for name, value in state.items():
        if dropped.match(name):
            continue
        for pattern, replacement in RENAMED.get(family, ()):
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def release_config(family: str, config: Config) -> Config:
    """Return the configuration with the keys that releases have."""
    config = deepcopy(config)
    text = config.get("text_config", config)
    if family not in NESTED_ROPE:
        _flat_rope(text)
    change = CHANGES.get(family)
    return (change(config, text) if change else None) or config


# These read `rope_parameters` themselves.
NESTED_ROPE = {
    "gemma3",
    "gemma3_text",
    "gemma4",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax_m3_vl",
    "ministral3",
    "mistral3",
    "mistral4",
    "muse_glimmer",
    "olmo3",
    "olmo_hybrid",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_vl",
    "glm_moe_dsa",
}


def _flat_rope(text: Config) -> None:
    rope = text.pop("rope_parameters", None)
    if rope is None:
        return
    if "rope_theta" not in rope:
        text["rope_parameters"] = rope
        return
    text["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        text["partial_rotary_factor"] = rope["partial_rotary_factor"]
    kind = rope.get("rope_type", "default")
    text["rope_scaling"] = None
    if kind != "default":
        rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        text["rope_scaling"] = rest | {"type": kind}


def _set(**values: Any) -> Callable[[Config, Config], None]:
    """Set keys of the text configuration; a callable is given that configuration."""

    def change(config: Config, text: Config) -> None:
        for key, value in values.items():
            text[key] = value(text) if callable(value) else value

    return change


def _head_dim(text: Config) -> int:
    return text["hidden_size"] // text["num_attention_heads"]


def _leading_dense(text: Config) -> int:
    return [*text["mlp_layer_types"], "sparse"].index("sparse")


def _until_full(text: Config) -> int:
    return text["layer_types"].index("full_attention") + 1


def _gemma3(config: Config, text: Config) -> None:
    rope = text["rope_parameters"]
    text["rope_theta"] = rope["full_attention"]["rope_theta"]
    text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    text["sliding_window_pattern"] = _until_full(text)
    if text is not config:
        config["vocab_size"] = VOCAB


def _gemma4(config: Config, text: Config) -> None:
    config["vocab_size"] = VOCAB
    if "per_layer_config" in text:  # Since transformers 5.13.
        text["global_head_dim"] = text.pop("per_layer_config")["1"]["head_dim"]


def _mimo(config: Config, text: Config) -> None:
    full, sliding = (text["rope_parameters"][f"{k}_attention"] for k in ("full", "sliding"))
    config |= {
        "hybrid_layer_pattern": [int(t == "sliding_attention") for t in text["layer_types"]],
        "moe_layer_freq": [int(t == "sparse") for t in text["mlp_layer_types"]],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": text["sliding_window"],
        "n_shared_experts": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": text["rms_norm_eps"],
        "rope_theta": full["rope_theta"],
        "swa_rope_theta": sliding["rope_theta"],
        "swa_num_attention_heads": text["num_attention_heads"],
        "swa_num_key_value_heads": 2 * text["num_key_value_heads"],
        "swa_head_dim": text["head_dim"],
        "swa_v_head_dim": text["v_head_dim"],
        "partial_rotary_factor": full["partial_rotary_factor"],
    }


def _kimi_linear(config: Config, text: Config) -> None:
    kinds = list(enumerate(text["layer_types"], 1))
    config |= {
        "rope_theta": 10000.0,
        "mla_use_nope": True,
        "first_k_dense_replace": _leading_dense(text),
        "linear_attn_config": {
            "kda_layers": [i for i, kind in kinds if kind == "linear_attention"],
            "full_attn_layers": [i for i, kind in kinds if kind != "linear_attention"],
            "head_dim": text["linear_head_dim"],
            "num_heads": text["linear_num_heads"],
            "short_conv_kernel_size": text["linear_conv_kernel_dim"],
        },
    }


def _step(config: Config, text: Config) -> Config:
    rope = [text["rope_parameters"][kind] for kind in text["layer_types"]]
    groups = text["num_key_value_heads"]
    sparse = [str(i) for i, kind in enumerate(text["mlp_layer_types"]) if kind == "sparse"]
    return text | {
        "model_type": "step3p5",
        "num_attention_groups": groups,
        "moe_num_experts": text["n_routed_experts"],
        "moe_top_k": text["num_experts_per_tok"],
        "moe_layers_enum": ",".join(sparse),
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": text["num_sliding_attention_heads"],
            "num_attention_groups": groups,
        },
        "rope_theta": [r["rope_theta"] for r in rope],
        "partial_rotary_factors": [r.get("partial_rotary_factor", 1.0) for r in rope],
    }


def _olmo3(config: Config, text: Config) -> None:
    full = text["rope_parameters"]["full_attention"]
    text["rope_theta"] = full["rope_theta"]
    if full["rope_type"] != "default":
        text["rope_scaling"] = full


def _original_length(config: Config, text: Config) -> None:
    if text["rope_scaling"]:
        length = text["rope_scaling"].pop("original_max_position_embeddings")
        text["original_max_position_embeddings"] = length


def _kimi_vl(config: Config, text: Config) -> Config:
    return {"model_type": "kimi_vl", "text_config": text | {"model_type": "deepseek_v3"}}


NO_SCALING = {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}
EXPERTS = _set(num_experts=lambda c: c["num_local_experts"])
CHANGES: dict[str, Callable[[Config, Config], Config | None]] = {
    "apertus": _set(mlp_bias=False, post_norm=False, qk_norm=True),
    "cohere2": _set(sliding_window_pattern=_until_full, head_dim=_head_dim),
    "deepseek_v2": _set(
        rope_scaling=lambda c: c["rope_scaling"] or {"type": "yarn", "factor": 1.0}
    ),
    "deepseek_v32": _set(first_k_dense_replace=_leading_dense),
    "exaone4": _set(
        head_dim=_head_dim,
        sliding_window_pattern=lambda c: "".join(
            "L" if kind == "sliding_attention" else "G" for kind in c["layer_types"]
        ),
    ),
    "exaone_moe": _set(is_moe_layer=lambda c: [t == "sparse" for t in c["mlp_layer_types"]]),
    "falcon_h1": _set(head_dim=_head_dim),
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "gemma4": _gemma4,
    "glm4_moe_lite": _set(first_k_dense_replace=_leading_dense),
    "glm_moe_dsa": _set(
        first_k_dense_replace=_leading_dense,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        moe_layer_freq=1,
    ),
    "granitemoehybrid": _set(
        layer_types=lambda c: [
            "mamba" if kind in ("linear_attention", "mamba") else "attention"
            for kind in c["layer_types"]
        ]
    ),
    "hunyuan_v1_dense": _set(rope_scaling=NO_SCALING),
    "hunyuan_v1_moe": _set(
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
        use_cla=False,
        cla_share_factor=1,
        rope_scaling=NO_SCALING,
    ),
    "kimi_linear": _kimi_linear,
    "kimi_vl": _kimi_vl,
    "lfm2": _set(block_dim=lambda c: c["hidden_size"]),
    "longcat_flash": _set(
        attention_method="MLA",
        zero_expert_type="identity",
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
    ),
    "mellum": EXPERTS,
    "mimo_v2_flash": _mimo,
    "minicpm3": _set(rope_scaling=lambda c: c["rope_scaling"] or {"type": "default"}),
    "minimax_m2": _set(
        shared_intermediate_size=0,
        rotary_dim=lambda c: int(c["head_dim"] * c["partial_rotary_factor"]),
    ),
    "olmo3": _olmo3,
    "phi3": _original_length,
    "phimoe": _original_length,
    "qwen3_5_moe_text": _set(model_type="qwen3_5_moe"),
    "qwen3_5_text": _set(model_type="qwen3_5"),
    "qwen3_moe": EXPERTS,
    "qwen3_vl_moe": _set(num_experts=lambda c: c["num_local_experts"], norm_topk_prob=True),
    "solar_open": _set(first_k_dense_replace=0, partial_rotary_factor=1.0),
    "step3p7": _step,
}
