"""Kinds of layers in the words of older and newer transformers.

Since 5.13, transformers' classes take the older words and give the newer ones. Before, they
refuse the newer ones. Settings have the newer words with every version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = dict[str, Any]

KEYS = ("layer_types", "layers_block_type")
NEWER = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
}
"""Older → newer word."""
OLDER = {newer: older for older, newer in NEWER.items()}


def in_newer_words(settings: Settings) -> Settings:
    """Return settings whose kinds of layers have the newer words."""
    return _in_words(settings, NEWER)


def in_older_words(config: Mapping[str, Any]) -> Settings:
    """Return a config whose kinds of layers have the older words, the section's too."""
    changed = _in_words(config, OLDER)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        changed["text_config"] = _in_words(text, OLDER)
    return changed


def _in_words(settings: Mapping[str, Any], words: Mapping[str, str]) -> Settings:
    return {
        key: [words.get(kind, kind) if isinstance(kind, str) else kind for kind in value]
        if key in KEYS and isinstance(value, list)
        else value
        for key, value in settings.items()
    }
