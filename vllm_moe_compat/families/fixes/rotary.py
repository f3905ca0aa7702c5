"""Rotary embeddings as the config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError


def scale_rope(model: Any, config: Mapping[str, Any]) -> bool:
    """Replace each layer's rotary embedding by the scaled one that the config requires.

    Several modules build an unscaled ``nn.RoPE`` whatever ``rope_scaling`` is. An embedding of
    another class, or with a scale other than 1, already follows the config and is kept.

    Args:
        model: the instance.
        config: the language model's config.

    Returns:
        Whether embeddings were replaced.

    Raises:
        UnsupportedCheckpointError: mlx-lm cannot build the embedding.
    """
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return False
    if scaling.get("type", scaling.get("rope_type")) in (None, "default", "mrope"):
        return False
    import mlx.nn as nn
    from mlx_lm.models.rope_utils import initialize_rope

    attentions = [getattr(layer, "self_attn", None) for layer in getattr(model, "layers", ())]
    ropes = [(a, a.rope) for a in attentions if a is not None and hasattr(a, "rope")]
    if not ropes or not all(type(rope) is nn.RoPE and rope.scale == 1.0 for _, rope in ropes):
        return False
    for attention, rope in ropes:
        try:
            attention.rope = initialize_rope(
                rope.dims,
                base=rope.base,
                traditional=rope.traditional,
                scaling_config=dict(scaling),
                max_position_embeddings=config.get("max_position_embeddings"),
            )
        except (ValueError, TypeError, LookupError, AssertionError, ArithmeticError) as error:
            raise UnsupportedCheckpointError(
                f"config.json: rope_scaling is {dict(scaling)!r}, where a scaling that mlx-lm "
                f"knows was expected ({type(error).__name__}: {error}); correct the config."
            ) from error
    return True
