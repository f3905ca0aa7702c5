"""Values to try for a setting: what a published config could say instead.

A value must move the numbers visibly if it acts at all, so an epsilon becomes 0.05 and a window
is shorter than the test's prompt, and longer.
"""

from __future__ import annotations

import re
from typing import Any

ABSENT = "(absent)"
"""A key that the file leaves out."""
LONG, SHORT = 37, 12
"""Tokens of the two prompts: beyond every window and original length, and below."""
WINDOWS = (8, 24, 64)
ORIGINAL = 16
ACTIVATIONS = (
    "silu",
    "swish",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
    "quick_gelu",
)
WORDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ACTIVATIONS,
    "hidden_activation": ACTIVATIONS,
    "mlp_hidden_act": ACTIVATIONS,
    "mamba_hidden_act": ("silu", "gelu", "relu"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "scoring_func": ("softmax", "sigmoid"),
    "position_embedding_type": ("rope", "nope", None),
    "gating": (True, False, "per-head", "per-element"),
}
KINDS = {
    "layer_types": ("full_attention", "sliding_attention"),
    "mlp_layer_types": ("dense", "sparse"),
    "layers_block_type": ("linear_attention", "moe", "full_attention", "mlp"),
    "indexer_types": ("full", "shared"),
}
# What a number may be where the config says null.
UNSET: dict[str, tuple[Any, ...]] = {
    "head_dim": (8, 24),
    "sliding_window": WINDOWS,
    "q_lora_rank": (32,),
    "n_group": (1, 2),
    "topk_group": (1,),
    "attn_logit_softcapping": (2.0,),
    "final_logit_softcapping": (2.0,),
    "clip_qkv": (0.5,),
    "attention_chunk_size": (8,),
    "moe_latent_size": (48,),
    "full_attn_idxs": ([0], [1]),
    "swiglu_limits": ([0.5] * 4, [0.0, 0.5, 0.0, 0.5]),
    "swiglu_limits_shared": ([0.5] * 4, [0.0, 0.5, 0.0, 0.5]),
    "use_bidirectional_attention": (True, False),
}
MAY_BE_ZERO = re.compile(
    r"first_k_dense_replace|n(um)?_shared_experts|zero_expert_num|num_dense_layers|.*_offset"
    r"|num_kv_shared_layers|moe_layer_start_index|index_local_blocks|.*_interval|max_window_layers"
)
SIZES = re.compile(
    r".*(_size|_size_mlp|_dim|_dims|_rank|_heads|_experts|_layers|_width|hidden_size_per_layer_input"
    r"|_d_ssm|_d_state|_d_head|_n_groups|_groups)|vocab_size.*|d_model"
)
"""Settings that are sizes: their defaults are those of whole models, too large to try."""


def alternatives(name: str, value: Any, default: Any, layers: int) -> list[Any]:
    """Return the values to try for a setting.

    Args:
        name: last part of its path.
        value: what the baseline has.
        default: what the config class has; ``ABSENT`` if it has none.
        layers: number of decoder layers.
    """
    if SIZES.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool):
        return [value * 2, value // 2] if value > 1 else [value * 2, value + 2]
    found: list[Any] = [ABSENT] if default is ABSENT else [ABSENT, default]
    if name in WORDS:
        found += WORDS[name]
    elif name in KINDS and isinstance(value, list):
        found += _lists(value, KINDS[name], layers)
    elif isinstance(value, bool):
        found += [not value, None]
    elif name.endswith("partial_rotary_factor"):
        found += [0.25, 0.5, 1.0]
    elif value is None:
        found += UNSET.get(name, (True, 8, 0.5))
    elif name == "sliding_window":
        found += [*WINDOWS, None]
    elif isinstance(value, int):
        half = value // 2
        found += [value * 2, value + 1, *([half] if half or MAY_BE_ZERO.fullmatch(name) else [])]
    elif isinstance(value, float):
        found += [0.05] if name.endswith(("eps", "epsilon")) else _floats(value)
        found += [None] if name in UNSET else []
    elif isinstance(value, list) and not value:
        found += [[0], [1], list(range(layers))]
    elif isinstance(value, list):
        found += [value[::-1]]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
            found += [[1 - v if v in (0, 1) else 0.7 * v for v in value], [value[0]] * len(value)]
    elif name == "per_layer_config" and isinstance(value, dict):
        found += [{key: {k: v // 2 for k, v in own.items()} for key, own in value.items()}]
    kept: list[Any] = []
    for candidate in found:
        known = [value, *kept]
        if not any(candidate == k and type(candidate) is type(k) for k in known):
            kept.append(candidate)
    return kept


def _floats(value: float) -> list[float]:
    return [value * 2, 1.0, value + 0.3] if abs(value) < 10 else [value * 2, value / 2]


def _lists(value: list[Any], kinds: tuple[str, ...], layers: int) -> list[list[Any]]:
    """Return the list reversed, rotated, uniform and irregular."""
    used = list(dict.fromkeys(value))
    other = [*used, *(k for k in kinds if k not in used)]
    found = [value[::-1], value[1:] + value[:1], value[-1:] + value[:-1]]
    found += [[kind] * layers for kind in other]
    for kind in other[1:]:
        mixed = [other[0]] * layers
        mixed[-1] = kind
        found += [mixed, mixed[::-1]]
        if layers > 2:
            found += [[other[0], kind, kind, *([other[0]] * (layers - 3))]]
    return found
