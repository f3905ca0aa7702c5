"""How many experts the router of a model chooses for a token, by its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.arguments import REQUIRED, UNKNOWN, arguments
from vllm_moe_compat.plan.effective_config import text_section

KEYS = (
    "num_experts_per_tok",  # most families
    "num_experts_per_token",  # Kimi Linear
    "top_k_experts",  # Gemma 4
    "moe_topk",  # Hunyuan, LongCat-Flash
    "moe_top_k",  # Step 3.5
    "moe_k",  # ERNIE 4.5
)
"""The names of the setting in mlx-lm's modules, each with the families that use it."""


def experts_per_token(config: Mapping[str, Any], module: str) -> int:
    """Return the number of experts that a token needs in a layer.

    Experts that are no weights (LongCat's zero experts) count too, since the router may choose
    none of them. If layers differ, it is the largest number.

    Args:
        config: the effective config.
        module: import path of the mlx-lm module.

    Raises:
        UnsupportedCheckpointError: the config does not say it under a name that is known.
    """
    text = text_section(config)
    found = arguments(module, text.get("model_type"))
    # A config may have several of these; the module reads one.
    defaults = dict.fromkeys(KEYS) if found is None else found.text
    for key in (key for key in KEYS if key in defaults):
        value = text.get(key, config.get(key, defaults[key]))
        counts = value if isinstance(value, (list, tuple)) else [value]
        if counts and all(_is_count(count) for count in counts):
            return int(max(counts))
        if value not in (None, REQUIRED, UNKNOWN):
            raise UnsupportedCheckpointError(
                f"config.json: {key} is {value!r}, where the number of experts of a token was "
                "expected; download the config again."
            )
    raise UnsupportedCheckpointError(
        f"config.json does not say how many experts a token needs, as {module} names it "
        f"(one of {', '.join(KEYS)}); without that no cache of experts has a size."
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
