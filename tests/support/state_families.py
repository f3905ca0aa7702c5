"""A tiny random model of every family with states, and passes of one token over it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path

from parity.available import is_installed
from parity.mlx_families import FAMILIES as MLX_FAMILIES
from support import hybrid, models
from vllm_moe_compat.backend.model.experts import widen_experts
from vllm_moe_compat.backend.pages.layers import Layer, StateLayer

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# Families without experts, beside those of the other tables.
DENSE: dict[str, dict[str, Any]] = {
    "lfm2": {
        **BASE,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
    },
    "olmo_hybrid": {
        **BASE,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
        "attention_bias": False,
    },
    "plamo2": {
        **BASE,
        "hidden_size_per_head": 16,
        "mamba_d_state": 16,
        "mamba_num_heads": 8,
        "attention_window_size": 64,
        "full_attention_idx": [1],
    },
    "gear": {
        **BASE,
        "head_dim": 16,
        "sliding_window": 64,
        "layer_types": ["conv_mixer", "full_attention", "conv_mixer", "sliding_attention"],
    },
    "baichuan_m1": {
        **BASE,
        "rope_theta": 10000.0,
        "sliding_window": 64,
        "sliding_window_layers": [1, 3],
        "conv_window": 2,
    },
    "recurrent_gemma": {
        **BASE,
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "rope_theta": 10000.0,
        "attention_window_size": 64,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
}
# Latent attention before layers with states, so that these see how it rounds.
LATENTS_FIRST = {
    "full_attn_layers": [2],
    "kda_layers": [1, 3, 4],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}
WITH_STATES = (
    *("lfm2_moe", "jamba", "granitemoehybrid", "nemotron_h", "qwen3_next", "kimi_linear"),
    "falcon_h1",
)
_OTHERS = {family.module: family for family in MLX_FAMILIES}
_MLX_ONLY = (
    *("bailing_moe_linear", "bailing_hybrid", "bailing_moe_v3", "kimi_k3"),
    "longcat_flash_ngram",
)
OTHERS = tuple(name for name in _MLX_ONLY if name in _OTHERS)
NAMES = tuple(filter(is_installed, ("qwen3_5", *WITH_STATES, *OTHERS, *DENSE)))


def build(name: str, dtype: mx.Dtype = mx.float32) -> Any:
    """Make the model ``name`` with random weights of ``dtype``, none of them zero throughout."""
    if name == "qwen3_5":
        model = hybrid.model()
    elif name == "kimi_linear, latents first":
        model, _ = models.build_mlx("kimi_linear", linear_attn_config=LATENTS_FIRST)
    elif name in WITH_STATES:
        model, _ = models.build_mlx(name)
    else:
        config = DENSE[name] if name in DENSE else _OTHERS[name].config
        code = importlib.import_module(f"mlx_lm.models.{name}")
        mx.random.seed(7)
        model = code.Model(code.ModelArgs.from_dict({"model_type": name, **config}))

    def filled(where: str, weight: mx.array) -> mx.array:
        if not mx.issubdtype(weight.dtype, mx.floating):
            return weight
        if not weight.any().item():
            weight = mx.random.normal(weight.shape) * 0.5
        return weight.astype(dtype)

    model.update(tree_map_with_path(filled, model.parameters()))
    widen_experts(model)
    mx.eval(model.parameters())
    return model


class Caches:
    """mlx-lm's caches of a model, of which those with states can be replaced."""

    def __init__(self, model: Any) -> None:
        from mlx_lm.models.cache import ArraysCache, make_prompt_cache

        self.made = make_prompt_cache(model)
        parts = [part for cache in self.made for part in getattr(cache, "caches", (cache,))]
        self.stateful = [part for part in parts if isinstance(part, ArraysCache)]

    @property
    def states(self) -> list[tuple[mx.array, ...]]:
        """The states of all layers that have one."""
        return [tuple(cache.cache) for cache in self.stateful]

    def begin(self, layers: Sequence[Layer], rows: int) -> None:
        """Give every layer a state of zeros, as the backend does."""
        shapes = [layer for layer in layers if isinstance(layer, StateLayer)]
        for cache, layer in zip(self.stateful, shapes, strict=True):
            parts = zip(layer.shapes, layer.dtypes, strict=True)
            cache.cache = [mx.zeros((rows, *shape), dtype) for shape, dtype in parts]

    def replaced(self, others: Sequence[Any]) -> list[Any]:
        """Return the caches that the model takes, with ``others`` for those with states."""
        from mlx_lm.models.cache import CacheList

        instead = {id(one): other for one, other in zip(self.stateful, others, strict=True)}
        return [
            CacheList(*(instead.get(id(part), part) for part in cache.caches))
            if isinstance(cache, CacheList)
            else instead.get(id(cache), cache)
            for cache in self.made
        ]


def step_by_step(model: Any, caches: Caches, tokens: mx.array) -> list[list[tuple[Any, ...]]]:
    """Run one pass per token of ``tokens [B, T]``; return the states after each pass."""
    found = []
    for token in range(tokens.shape[1]):
        logits = model(tokens[:, token : token + 1], cache=caches.made)
        found.append(caches.states)
        mx.eval(logits, found[-1])
    return found
