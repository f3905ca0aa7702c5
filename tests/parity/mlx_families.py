"""Families that transformers has no class for, as tiny models of mlx-lm's own.

Without an oracle of another's, the model itself is one: its parameters are written as
the family publishes them, and have to come back bit for bit. ``publish`` undoes what
the module's ``sanitize`` does to everything but the routed experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from parity.available import is_installed
from parity.family import EXPERTS, MLA, THETA, VOCAB
from vllm_moe_compat.execute.arrays import Arrays, run
from vllm_moe_compat.families.row import COMBINED, PER_EXPERT
from vllm_moe_compat.plan.ops import SplitRows, Transpose

Config = dict[str, Any]
Tensors = dict[str, mx.array]
Pair = tuple[str, mx.array]

BASE: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": THETA,
}
BAILING: Config = {
    **BASE,
    **EXPERTS,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "n_group": 1,
    "topk_group": 1,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 1.5,
    "head_dim": 16,
}
LATENT: Config = {**MLA, "qk_nope_head_dim": 8}


@dataclass(frozen=True, eq=False)
class MlxFamily:
    """One family.

    ``module`` is mlx-lm's, and its ``model_type`` where ``config`` says no other;
    ``layout`` is what its experts are published in; ``values`` changes random ones that
    the module cannot have; ``runs`` is false where the forward pass wants Metal;
    ``forms`` are the only ones that it is in.
    """

    module: str
    config: Config
    names: tuple[tuple[str, str], ...] = ()
    publish: Callable[[Tensors, Config], Tensors] = lambda tensors, config: tensors
    values: Callable[[Tensors], Tensors] = lambda tensors: tensors
    layout: str = PER_EXPERT
    runs: bool = True
    forms: tuple[str, ...] = ()

    def published(self, tensors: Tensors) -> Tensors:
        """Return all but the experts under the names that releases have."""
        found = {}
        for name, array in self.publish(tensors, self.config).items():
            for pattern, replacement in self.names:
                name = re.sub(pattern, replacement, name)
            found[name] = array
        return found


def latent(tensors: Tensors, config: Config) -> Tensors:
    """Join ``embed_q`` ``[heads, r, n]`` and ``unembed_out`` ``[heads, v, r]`` to ``kv_b_proj``."""
    found = {}
    for name, array in tensors.items():
        if name.endswith(".embed_q.weight"):
            module = name.removesuffix("embed_q.weight")
            unembed = tensors[f"{module}unembed_out.weight"]
            rows = mx.concatenate([array.swapaxes(-1, -2), unembed], axis=1)
            found[f"{module}kv_b_proj.weight"] = rows.reshape(-1, rows.shape[-1])
        elif not name.endswith(".unembed_out.weight"):
            found[name] = array
    return found


def turned(array: mx.array) -> mx.array:
    """Give a convolution torch's order: ``[C, K, 1]`` becomes ``[C, 1, K]``."""
    return run(Transpose(), Arrays([array]), "float32").weights[0]


def bailing_v3(tensors: Tensors, config: Config) -> Tensors:
    return {
        name: turned(array) if name.endswith("_conv1d.weight") else array
        for name, array in latent(tensors, config).items()
    }


def kimi_k3(tensors: Tensors, config: Config) -> Tensors:
    found = {}
    for name, array in latent(tensors, config).items():
        head, _, rest = name.rpartition(".self_attn.")
        end = {"qkv_proj.weight": "_proj", "qkv_conv.conv.weight": "_conv1d"}.get(rest)
        if end is None:
            found[name] = array
            continue
        parts = run(SplitRows(3), Arrays([array]), "float32").weights
        for letter, part in zip("qkv", parts, strict=True):
            value = turned(part) if part.ndim == 3 else part
            found[f"{head}.self_attn.{letter}{end}.weight"] = value
    return found


ZERO_CENTERED = (
    "input_layernorm.weight",
    "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm.weight",
    "pre_expert_norm.weight",
    "post_expert_norm.weight",
)


GATE = mx.linspace(-1, 1, 64)
WORDS = {"attn_alpha": "attention", "ffn_alpha": "feedforward"}


def muse_values(tensors: Tensors) -> Tensors:
    """Give gates and norms values that its ``sanitize`` can compute."""
    from mlx_lm.models.muse_spark import residual_gate_coefficients

    alpha, beta = residual_gate_coefficients(GATE)
    found = {}
    for name, array in tensors.items():
        if name.endswith("_alpha"):
            array = alpha
        elif name.endswith("_beta"):
            array = beta
        elif name.endswith(ZERO_CENTERED):
            array = array.astype(mx.bfloat16)
        found[name] = array
    return found


def muse_spark(tensors: Tensors, config: Config) -> Tensors:
    """Take the fused attention apart; norms are stored less 1, gates by their logits."""
    return dict(pair for name in tensors for pair in _muse(name, tensors, config["text_config"]))


def _muse(name: str, tensors: Tensors, text: Config) -> Iterator[Pair]:
    array = tensors[name]
    if name.endswith("qkvg_proj.weight"):
        heads = (text["num_attention_heads"], text["num_key_value_heads"])
        width = text["head_dim"]
        rows = [count * width for count in (*heads, heads[1], heads[0])]
        ends = [sum(rows[:n]) for n in (1, 2, 3)]
        for part, value in zip(("q", "k", "v", "gate"), mx.split(array, ends), strict=True):
            if part in "qk":  # neighbours (2i, 2i + 1) were i and i + width / 2
                pairs = value.reshape(-1, width // 2, 2, value.shape[-1])
                value = mx.contiguous(pairs.swapaxes(1, 2).reshape(value.shape))
            yield name.replace("qkvg_proj", f"{part}_proj"), value
    elif name.endswith(ZERO_CENTERED):
        yield name, array.astype(mx.float32) - 1
    elif name.endswith("_alpha"):
        head, _, rest = name.rpartition(".add_")
        yield f"{head}.post_{WORDS[rest]}_residual_gate.gate", GATE
    elif not name.endswith("_beta"):
        yield name, array


ROUTER = ((r"\.mlp\.gate\.gate_proj\.", ".mlp.gate."),)
_EVERY = (
    MlxFamily(
        "Klear",
        {
            **BASE,
            **EXPERTS,
            "attention_bias": False,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
        },
    ),
    MlxFamily("bailing_moe", BAILING, ROUTER),
    MlxFamily(
        "bailing_moe_linear",
        {**BAILING, "num_key_value_heads": 4, "layer_group_size": 2, "group_norm_size": 2},
        ROUTER,
    ),
    MlxFamily(
        "bailing_hybrid",
        {**BAILING, **LATENT, "layer_group_size": 2, "group_norm_size": 2},
        ROUTER,
        latent,
    ),
    MlxFamily(
        "bailing_moe_v3",
        {
            **BAILING,
            **LATENT,
            "model_type": "bailing_hybrid",
            "architectures": ["BailingMoeV3ForCausalLM"],
            "layer_group_size": 2,
            "short_conv_kernel_size": 4,
            "moe_shared_expert_intermediate_size": 96,
        },
        publish=bailing_v3,
    ),
    MlxFamily(
        "phixtral",
        {
            "num_vocab": VOCAB,
            "model_dim": 64,
            "num_heads": 4,
            "num_layers": 2,
            "rotary_dim": 8,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
        },
        forms=("published", "block FP8", "per-channel FP8"),
    ),
    MlxFamily(
        "deepseek",
        {
            **BASE,
            "moe_intermediate_size": 96,
            "n_shared_experts": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    MlxFamily(
        "longcat_flash_ngram",
        {
            **LATENT,
            "vocab_size": VOCAB,
            "hidden_size": 96,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 64,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "zero_expert_type": "identity",
            "num_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "routed_scaling_factor": 1.5,
            "rms_norm_eps": 1e-6,
            "rope_theta": THETA,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "ngram_vocab_size_ratio": 3,
            "emb_neighbor_num": 3,
            "emb_split_num": 2,
        },
        ((r"\.ngram_embeddings\.word_embeddings\.", ".embed_tokens."),),
        latent,
    ),
    MlxFamily(
        "kimi_k3",
        {
            "text_config": {
                **BASE,
                **LATENT,
                "model_type": "kimi_linear",
                "hidden_act": "situ",
                "num_key_value_heads": 4,
                "num_experts": 4,
                "num_experts_per_token": 2,
                "num_shared_experts": 1,
                "moe_intermediate_size": 96,
                "first_k_dense_replace": 1,
                "linear_attn_config": {
                    "kda_layers": [1],
                    "full_attn_layers": [2],
                    "head_dim": 32,
                    "num_heads": 2,
                    "short_conv_kernel_size": 4,
                },
            },
        },
        (
            (r"\.mlp\.(gate|shared_experts)\.", r".block_sparse_moe.\1."),
            (r"\.mlp\.(e_score_correction_bias)$", r".block_sparse_moe.gate.\1"),
        ),
        kimi_k3,
    ),
    MlxFamily(
        "muse_spark",
        {
            "text_config": {
                "vocab_size": VOCAB,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "num_hidden_layers": 2,
                "rms_norm_eps": 1e-6,
                "post_norm_eps": 1e-6,
                "rope_parameters": {"rope_theta": THETA},
                "layer_rope_theta": [THETA, 0],
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 16,
                "final_logit_softcapping": 30.0,
                "output_multiplier": 1.0,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "moe_hidden_size": 64,
                "moe_intermediate_size": 96,
            },
        },
        publish=muse_spark,
        values=muse_values,
        layout=COMBINED,
        runs=False,
        forms=("published", "per-expert"),
    ),
)
FAMILIES = tuple(family for family in _EVERY if is_installed(family.module))
