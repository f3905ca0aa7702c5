"""The settings that an mlx-lm module gets from a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moe_compat.families import modules
from vllm_moe_compat.families.arguments import REQUIRED, arguments
from vllm_moe_compat.plan.make import name_module


def as_read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of the config's module: given, the default, or ``REQUIRED``."""
    named = dict(config)
    name_module(named)
    text = named.get("text_config")
    section = text if isinstance(text, Mapping) else named
    read = arguments(modules.find(named).path, section.get("model_type"))
    assert read is not None
    found = {key: section.get(key, default) for key, default in read.text.items()}
    found |= {f"whole {key}": named.get(key, default) for key, default in read.whole.items()}
    found.pop("whole text_config", None)
    return {key: value for key, value in found.items() if not key.endswith("model_type")}


def is_complete(config: Mapping[str, Any]) -> bool:
    """Whether the config gives every argument that its module requires."""
    return REQUIRED not in as_read(config).values()
