"""The epsilon of the norms inside latent attention (MLA).

transformers' classes norm the latent queries and keys with 1e-6, whatever ``rms_norm_eps`` says.
Some of mlx-lm's modules take ``rms_norm_eps``, others MLX's default, 1e-5. The difference is
small: 1e-5 of the logits where latents have a mean square near 1, more where they are smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings

EPSILON = 1e-6
_NAMES = ("q_a_layernorm", "kv_a_layernorm")


def latent_norms(own: Callable[[Settings], Any], *keys: str) -> ForwardFix:
    """Return the fix of a module.

    Args:
        own: takes the settings; returns the epsilon that the module takes, None if unknown.
        keys: the settings that decide.
    """

    def needed(settings: Settings) -> str | None:
        if own(settings) in (None, EPSILON):
            return None
        return f"an epsilon of {EPSILON} in the norms of latent attention"

    def apply(model: Any, settings: Settings) -> None:
        for path, part in model.named_modules():
            if path.rpartition(".")[2] in _NAMES:
                part.eps = EPSILON

    return ForwardFix(
        "latent-norms",
        "the norms of latent attention have another epsilon",
        keys,
        needed,
        apply,
    )


OF_CONFIG = (latent_norms(lambda settings: settings.get("rms_norm_eps"), "rms_norm_eps"),)
"""For modules that take ``rms_norm_eps``."""
OF_MLX = (latent_norms(lambda settings: 1e-5),)
"""For modules that take MLX's default."""
