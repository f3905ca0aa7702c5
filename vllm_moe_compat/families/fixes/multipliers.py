"""Multipliers of hidden states that a module leaves out."""

from __future__ import annotations

from typing import Any

from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings


def _needed(settings: Settings) -> str | None:
    multiplier = settings.get("key_multiplier")
    return None if multiplier in (None, 1) else f"key_multiplier {multiplier}"


def _apply(model: Any, settings: Settings) -> None:
    for layer in model.layers:
        layer.self_attn.scale *= settings["key_multiplier"]


KEY_MULTIPLIER = ForwardFix(
    "key-multiplier",
    "sanitize looks for key_proj, which is named k_proj, so keys are not multiplied",
    ("key_multiplier",),
    _needed,
    _apply,
)
"""Falcon-H1's factor of the keys, as a factor of the scores: the rotary embedding between the two
is linear."""
