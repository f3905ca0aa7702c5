"""Which activation each mlx-lm module has in its code, and whether another can be put in."""

from __future__ import annotations

from vllm_moe_compat.families.fixes.activations import activation_fix
from vllm_moe_compat.families.fixes.fix import ForwardFix

SILU = activation_fix()
TANH_GELU = activation_fix("gelu_pytorch_tanh")
SILU_ALONE = activation_fix(fixed=True)
"""Convolutions of state layers are activated by the same function, or gates are clamped."""
RELU2 = activation_fix("relu2")

_FIXES: dict[str, ForwardFix | None] = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text"), TANH_GELU),
    **dict.fromkeys(("nemotron", "nemotron_h"), RELU2),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "granitemoehybrid"), SILU_ALONE),
    **dict.fromkeys(("jamba", "kimi_linear", "falcon_h1", "olmo_hybrid", "step3p5"), SILU_ALONE),
    "starcoder2": activation_fix("gelu"),
    "apertus": activation_fix("xielu"),
    # Activations of their own.
    **dict.fromkeys(("gpt_oss", "kimi_k3"), None),
}


def activation_fixes(module: str) -> tuple[ForwardFix, ...]:
    """Return the fix of a module's activation; most modules compute SiLU."""
    fix = _FIXES.get(module, SILU)
    return () if fix is None else (fix,)
