"""The few facts that are read from a checkpoint's ``config.json``.

The file is untrusted: any value may be of any type. A multimodal config nests
the language model's under ``text_config``, which therefore answers first. A value
that is there and means nothing is refused; one that is not there is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moe_compat.errors import LayoutError

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the dicts that describe the language model, the nearest first."""
    text = config.get("text_config")
    return [text, config] if isinstance(text, Mapping) else [config]


def whole_number(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first positive number under one of the keys; zero counts as absent."""
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
    """Return how many routed experts a layer has, by whichever key the family uses."""
    return whole_number(config, *EXPERT_COUNT_KEYS)


EXPERT_WIDTH_KEYS = (
    "moe_latent_size",
    "routed_expert_hidden_size",
    "moe_hidden_size",
    "hidden_size",
)


def expert_width(config: Mapping[str, Any]) -> int | None:
    """Return ``H`` of the routed experts: the model's width, or the latent one they have."""
    return whole_number(config, *EXPERT_WIDTH_KEYS)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Return how many decoder layers the model has."""
    return whole_number(config, "num_hidden_layers", "num_layers")


def quantization_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the ``quantization_config`` dicts that are there, the outermost first."""
    found = (section.get("quantization_config") for section in reversed(sections(config)))
    return [entry for entry in found if isinstance(entry, Mapping)]


def block_sizes(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return the rows and columns that share one FP8 scale, for every block that is named.

    ``weight_block_size`` is the hub's; compressed-tensors names ``block_structure``,
    or a ``group_size`` along the columns, per group of layers.
    """
    found: list[tuple[int, int]] = []
    for entry in quantization_configs(config):
        if (value := entry.get("weight_block_size")) is not None:
            found.append(_block("weight_block_size", value))
        groups = entry.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                continue
            if (value := weights.get("block_structure")) is not None:
                if isinstance(value, str):
                    value = [int(n) for n in value.split("x") if n.isdigit()]
                found.append(_block("block_structure", value))
            elif weights.get("strategy") == "group":
                found.append(_block("group_size", [1, weights.get("group_size")]))
    return tuple(dict.fromkeys(found))


def _block(key: str, value: Any) -> tuple[int, int]:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in value)
    ):
        raise LayoutError(
            f"config.json: {key} is {value!r}, where two positive whole numbers "
            "were expected; download the config again or correct it."
        )
    return value[0], value[1]
