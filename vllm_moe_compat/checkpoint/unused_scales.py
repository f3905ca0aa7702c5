"""Names of tensors that only quantised activations and caches need.

Releases carry scales and zero points of activations, queries, KV caches and attention
probabilities beside the weights, whatever the weights' own form is: a bfloat16 checkpoint may
have scales for an FP8 cache. MLX computes with activations and caches in floats, so they are
set aside by name. The names are those that vLLM knows (``maybe_remap_kv_scale_name`` and the
``get_cache_scale_mapper`` of its quantisation methods), and those of compressed-tensors,
ModelOpt and Quark.

A name counts as a whole, after a dot: Gemma 3n's ``altup.correct_output_scale`` is a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_LEAVES = (
    *("activation_scale", "input_activation_scale", "output_activation_scale"),
    *("input_scale", "output_scale", "kv_scale"),
    *("q_scale", "k_scale", "v_scale", "prob_scale", "prob_output_scale"),
    *("input_global_scale", "output_global_scale"),
    *("q_global_scale", "k_global_scale", "v_global_scale"),
    *("input_zero_point", "output_zero_point"),
    *("q_zero_point", "k_zero_point", "v_zero_point"),
)
_CACHES = (".q.scale", ".k_cache.scale", ".v_cache.scale")
"""Names of scales for modules that have no weight: Hunyuan 3's."""
_ENDINGS = (*_LEAVES, *_CACHES)
# Combined experts join the projection's name to the scale's.
_NAME = re.compile(
    r"(?:^|\.)(?:(?:gate_up|gate|up|down|qkv|[qkvo])_proj_|w(?:13|[123])_)?"
    rf"(?:{'|'.join(_LEAVES)})$"
)


def is_unused_scale(name: str) -> bool:
    """Whether a name, or its end, is that of a scale for activations or caches."""
    # The tuple is the fast path: nearly all of sixty thousand names fail it.
    return name.endswith(_LEAVES) and _NAME.search(name) is not None


def unused_scales(names: Collection[str]) -> tuple[str, ...]:
    """Return the names of scales and zero points for activations and caches, in order."""
    return tuple(
        name
        for name in names
        if name.endswith(_ENDINGS)
        and (
            is_unused_scale(name)
            or (name.endswith(_CACHES) and name.removesuffix("scale") + "weight" not in names)
        )
    )
