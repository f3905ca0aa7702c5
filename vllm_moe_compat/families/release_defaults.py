"""Defaults of releases whose config class comes with their own code.

transformers has no class for them, so what their ``config.json`` leaves out is recorded here, as
far as it changes the arithmetic. The key is the architecture, since two classes may share a
``model_type``, or else the ``model_type``. Sizes are not recorded: a file that leaves out a size
is refused where mlx-lm's module requires it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLASS_OF = {"longcat_flash_ngram": "longcat_flash", "youtu_llm": "youtu"}
"""``model_type`` → that of the class in transformers which has the same defaults."""

WITHOUT_CLASS = ("kimi_k3",)
"""Models whose section names a ``model_type`` with a class that is another model's."""

RELEASE_DEFAULTS: dict[str, dict[str, Any]] = {
    # Ling 1.
    "BailingMoeForCausalLM": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "use_bias": True,
        "use_qkv_bias": False,
        "norm_head": False,
        "norm_topk_prob": True,
        "num_shared_experts": 0,
        "first_k_dense_replace": 0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 16384,
    },
    # Ling 2.
    "BailingMoeV2ForCausalLM": {
        "rms_norm_eps": 1e-6,
        "rope_theta": 600000.0,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 1.0,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
    },
    "hunyuan": {
        "attention_bias": False,
        "cla_share_factor": 1,
        "moe_topk": 1,
        "num_shared_expert": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cla": False,
        "use_mixed_mlp_moe": False,
        "use_qk_norm": False,
    },
}


def release_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded defaults for a config; empty if there are none."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for name in (*names, config.get("model_type")):
        if isinstance(name, str) and name in RELEASE_DEFAULTS:
            return dict(RELEASE_DEFAULTS[name])
    return {}
