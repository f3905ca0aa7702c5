"""Windows and kinds of layers: the fixes and translations of each module.

By module of mlx-lm. What a module has not in these tables, it computes as transformers does.
"""

from __future__ import annotations

from typing import Any

from vllm_moe_compat.families.fixes import layer_types, windows
from vllm_moe_compat.families.fixes.fix import ForwardFix
from vllm_moe_compat.families.row import SettingTranslation

BOTH = layer_types.needs("full_attention", "conv")
FIXES: dict[str, tuple[ForwardFix, ...]] = {
    # No windows at all.
    "llama": (windows.MISTRAL,),
    "ministral3": (windows.MISTRAL,),
    "mistral3": (windows.MISTRAL,),
    "mixtral": (windows.EVERY_LAYER,),
    "phi3": (windows.EVERY_LAYER,),
    "phimoe": (windows.EVERY_LAYER,),
    "starcoder2": (windows.EVERY_LAYER,),
    "qwen3_moe": (windows.EVERY_LAYER,),
    "qwen2": (windows.LAYER_TYPES,),
    "qwen3": (windows.LAYER_TYPES,),
    "qwen2_moe": (windows.LAYER_TYPES,),
    "dots1": (windows.LAYER_TYPES,),
    "smollm3": (windows.LAYER_TYPES,),
    "gemma2": (windows.GEMMA_2,),
    # Windows by layer_types, if it has both kinds.
    "olmo3": (windows.MIXED,),
    "exaone4": (windows.MIXED,),
    "exaone_moe": (layer_types.EXAONE_MOE, windows.MIXED),
    "gpt_oss": (windows.MIXED,),
    "afmoe": (windows.MIXED,),
    "laguna": (windows.MIXED,),
    "mimo_v2_flash": (windows.MIXED,),
    # A period instead of layer_types.
    "cohere2": layer_types.WINDOWED,
    "gemma3": layer_types.WINDOWED,
    "gemma3_text": layer_types.WINDOWED,
    "qwen3_next": layer_types.HYBRID,
    "qwen3_5": layer_types.HYBRID,
    "qwen3_5_moe": layer_types.HYBRID,
    # What they cannot compute is refused.
    "llama4": (layer_types.LLAMA_4,),
    "lfm2": (BOTH,),
    "lfm2_moe": (BOTH,),
    "kimi_linear": (layer_types.needs("full_attention", "linear_attention"),),
    "mellum": (layer_types.needs("full_attention"),),
    "minimax": (layer_types.MINIMAX,),
}


class Kinds(list[Any]):
    """Kinds of layers; a kind that no layer has is found in layer 0.

    Several modules look up the first layer of each kind, to make a mask from its cache, and
    fail if there is none. The mask is not used where ``FIXES`` has ``MIXED`` or ``MISTRAL``.
    """

    def index(self, kind: Any, *bounds: Any) -> int:
        """Return the first layer of a kind, or 0."""
        return super().index(kind, *bounds) if kind in self else 0


def _uniform(key: str) -> SettingTranslation:
    def apply(config: dict[str, Any], text: dict[str, Any]) -> bool:
        kinds = text.get(key)
        if not isinstance(kinds, list) or isinstance(kinds, Kinds) or not kinds:
            return False
        if any(kind != kinds[0] for kind in kinds):
            return False
        text[key] = Kinds(kinds)
        return False  # The values are the same.

    return SettingTranslation(key, "a layer of each kind is looked up", apply)


UNIFORM_KINDS = (_uniform("layer_types"),)
TRANSLATIONS: dict[str, tuple[SettingTranslation, ...]] = {
    "llama": UNIFORM_KINDS,
    "ministral3": UNIFORM_KINDS,
    "mistral3": UNIFORM_KINDS,
    "smollm3": UNIFORM_KINDS,
    "olmo3": UNIFORM_KINDS,
    "gpt_oss": UNIFORM_KINDS,
    "afmoe": UNIFORM_KINDS,
    "laguna": UNIFORM_KINDS,
    "mimo_v2_flash": (_uniform("hybrid_layer_pattern"),),
}
