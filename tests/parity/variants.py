"""Families once more, with what their configuration can also say.

Scaled rotary embeddings, tied heads, dense layers in between, groups of experts:
each in the forms in which only the configuration or the names differ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from parity.dense import DENSE
from parity.family import ROPE, Family
from parity.moe_sigmoid import SIGMOID
from parity.moe_softmax import SOFTMAX

_BASES = {family.name: family for family in SOFTMAX + SIGMOID + DENSE}
FORMS = ("saved", "in-library", "release", "block FP8")

YARN = ROPE | {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE: dict[str, Any] = ROPE | {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.1 * i for i in range(8)],
    "original_max_position_embeddings": 16,  # shorter than the tests': mlx-lm knows only long
    "factor": 32.0,
}
LINEAR_ROPE = ROPE | {"rope_type": "linear", "factor": 2.0}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}


def _variant(name: str, forms: tuple[str, ...] = FORMS, **kwargs: Any) -> Family:
    base = _BASES[name.partition(" ")[0]]
    oracle = kwargs.pop("oracle", base.oracle)
    outer = base.outer
    if outer is not None and "tie_word_embeddings" in kwargs:
        outer = outer | {"tie_word_embeddings": kwargs["tie_word_embeddings"]}
    changed = base.kwargs | kwargs
    return replace(base, name=name, kwargs=changed, outer=outer, forms=forms, mtp="", oracle=oracle)


def _deep(name: str) -> Family:
    deep = _variant(f"{name} deep", num_hidden_layers=63, first_k_dense_replace=60)
    return replace(deep, tolerance=5e-5, note="the rounding of 63 layers adds up")


VARIANTS = (
    _variant("llama llama3", rope_parameters=LLAMA3),
    _variant("qwen3 yarn", rope_parameters=YARN),
    _variant("qwen3_moe yarn", rope_parameters=YARN),
    _variant("qwen3_moe tied", tie_word_embeddings=True),
    _variant("qwen3_moe mixed", mlp_only_layers=[0]),
    _variant("qwen2_moe mixed", mlp_only_layers=[0]),
    _variant("qwen2_moe linear", rope_parameters=LINEAR_ROPE),
    _variant("qwen3_vl_moe tied", tie_word_embeddings=True),
    _variant("qwen3_5_moe tied", tie_word_embeddings=True),
    _variant("qwen3_5 softmax", full_attention_interval=1, layer_types=["full_attention"] * 4),
    _variant("qwen3_next tied", tie_word_embeddings=True),
    _variant("mixtral tied", tie_word_embeddings=True),
    _variant("olmoe tied", tie_word_embeddings=True),
    _variant("gpt_oss yarn", rope_parameters=YARN | {"truncate": False}),
    _variant("llama4 llama3", rope_parameters=LLAMA3),
    _variant(
        "phimoe longrope",  # transformers' takes the short factors and the long mscale
        original_max_position_embeddings=16,
        rope_parameters=LONGROPE
        | {"short_factor": LONGROPE["long_factor"], "short_mscale": 1.2, "long_mscale": 1.3},
    ),
    _variant("phi3 longrope", rope_parameters=LONGROPE, original_max_position_embeddings=16),
    _variant("gemma3 untied", tie_word_embeddings=False),
    _variant(
        "mistral3 mistral4",
        forms=(*FORMS, "per-expert w1/w2/w3"),
        **(_BASES["mistral4"].kwargs | {"model_type": "mistral4", "head_dim": ...}),
    ),
    _variant("minicpm3 longrope", rope_parameters=LONGROPE),
    _variant("jamba offset", expert_layer_period=4),
    _variant("granitemoe tied", tie_word_embeddings=True),
    _variant("deepseek_v2 yarn", rope_parameters=MSCALE, oracle="yarn_apply_mscale"),
    _variant(
        "deepseek_v2 groups",
        topk_method="group_limited_greedy",
        oracle="DeepseekV2TopkRouter",
        **(GROUPS | {"num_experts_per_tok": 2}),
    ),
    _variant("deepseek_v3 yarn", rope_parameters=MSCALE),
    _variant("deepseek_v3 groups", **GROUPS),
    _variant("deepseek_v3 no q_lora", q_lora_rank=None),
    _deep("deepseek_v3"),
    _variant("glm4_moe groups", **GROUPS),
    _variant("dots1 tied", tie_word_embeddings=True),
    _variant("solar_open yarn", rope_parameters=YARN),
    _variant("nemotron_h groups", **GROUPS),
    _variant("nemotron_h latent", moe_latent_size=48),
    _deep("kimi_k25"),
    _variant("kimi_k25 yarn", rope_parameters=MSCALE),
    _variant("olmo3 yarn", rope_parameters={"sliding_attention": ROPE, "full_attention": YARN}),
    _variant(
        "laguna yarn",
        rope_parameters={
            "sliding_attention": ROPE,
            "full_attention": YARN | {"partial_rotary_factor": 0.5},
        },
    ),
)
