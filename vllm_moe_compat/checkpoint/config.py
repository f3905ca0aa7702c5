"""Read the few facts that planning needs from a checkpoint's ``config.json``.

The file is untrusted: any value may be of any type. A multimodal config nests the language
model's settings under ``text_config``, so that section is read first. An invalid value is
refused; a missing one is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vllm_moe_compat.errors import LayoutError

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def decode_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with floats for transformers' ``{"__float__": "Infinity"}``.

    JSON has no infinity, so transformers 5 writes it like this, and mlx-lm decodes it from 0.32
    on.
    """
    return {key: _decoded(value) for key, value in config.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        word = value.get("__float__") if len(value) == 1 else None
        known = isinstance(word, str) and word in _FLOATS
        return _FLOATS[str(word)] if known else {k: _decoded(v) for k, v in value.items()}
    return [_decoded(entry) for entry in value] if isinstance(value, list) else value


def sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the dicts that describe the language model, the innermost first."""
    text = config.get("text_config")
    return [text, config] if isinstance(text, Mapping) else [config]


def whole_number(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first positive number under one of the keys; zero counts as missing.

    Raises:
        LayoutError: the value is not a whole number.
    """
    for section in sections(config):
        for key in keys:
            value = section.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise LayoutError(
                    f"config.json: {key} is {value!r}, where a whole number was expected; "
                    "download the config again or correct it."
                )
            if value:
                return value
    return None


def expert_count(config: Mapping[str, Any]) -> int | None:
    """Return the number of routed experts per layer; families use different keys."""
    return whole_number(config, *EXPERT_COUNT_KEYS)


EXPERT_WIDTH_KEYS = (
    "moe_latent_size",
    "routed_expert_hidden_size",
    "moe_hidden_size",
    "hidden_size",
)


def expert_width(config: Mapping[str, Any]) -> int | None:
    """Return ``H`` of the routed experts: their latent width if they have one, else the model's."""
    return whole_number(config, *EXPERT_WIDTH_KEYS)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Return the number of decoder layers."""
    return whole_number(config, "num_hidden_layers", "num_layers")


def quantization_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the config's ``quantization_config`` dicts, the outermost first."""
    found = (section.get("quantization_config") for section in reversed(sections(config)))
    return [entry for entry in found if isinstance(entry, Mapping)]
