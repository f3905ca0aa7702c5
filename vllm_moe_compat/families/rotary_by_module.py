"""Which rotary embeddings each mlx-lm module computes by itself; the others are put in."""

from __future__ import annotations

from vllm_moe_compat.families.fixes.fix import ForwardFix
from vllm_moe_compat.families.fixes.rotary import PARTLY, rotary_fix

ALL = ("linear", "llama3", "yarn", "proportional")
"""The types of ``mlx_lm.models.rope_utils.initialize_rope`` that are right for all lengths."""
SCALED = rotary_fix(*ALL)
UNSCALED = rotary_fix()
LINEAR = rotary_fix("linear")
GLOBAL_SCALED = rotary_fix(*ALL, plain=("sliding_attention",))

_FIXES: dict[str, ForwardFix | None] = {
    # No type but the default one as transformers defines it; most build a plain embedding.
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "mixtral", "phimoe"), UNSCALED),
    **dict.fromkeys(("granitemoehybrid", "lfm2", "lfm2_moe", "minimax", "glm4_moe"), UNSCALED),
    **dict.fromkeys(("solar_open", "mimo_v2_flash", "step3p5", "exaone_moe"), UNSCALED),
    **dict.fromkeys(("ernie4_5", "ernie4_5_moe", "gemma2", "cohere2", "glm4"), UNSCALED),
    **dict.fromkeys(("stablelm", "starcoder2", "olmo_hybrid", "muse_glimmer"), UNSCALED),
    "minicpm3": UNSCALED,
    **dict.fromkeys(("phi3", "nemotron"), LINEAR),
    # The scaling of layers without a window alone.
    **dict.fromkeys(("gemma3", "gemma3_text", "olmo3"), GLOBAL_SCALED),
    # Hunyuan's own dynamic type, with an alpha.
    **dict.fromkeys(("hunyuan", "hunyuan_v1_dense"), rotary_fix("dynamic")),
    "deepseek_v2": rotary_fix("yarn"),
    "mellum": rotary_fix("llama3", "yarn", "proportional"),
    **dict.fromkeys(("gemma4", "gemma4_text"), rotary_fix(*ALL, PARTLY)),
    "youtu_llm": rotary_fix(*ALL, softmax=False),
    # No rotary embedding.
    **dict.fromkeys(("jamba", "nemotron_h", "kimi_linear"), None),
}


def rotary_fixes(module: str) -> tuple[ForwardFix, ...]:
    """Return the fix of a module's rotary embedding; most modules call ``initialize_rope``."""
    fix = _FIXES.get(module, SCALED)
    return () if fix is None else (fix,)
