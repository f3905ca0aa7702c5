"""What older versions of transformers' config classes say, in the words of newer ones.

The newest give kinds of layers other names, which older ones refuse, rotary settings per kind of
layer to OLMo 3, and a part of the head to MiniMax M2. Rows and records are written for the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Settings = dict[str, Any]

KEYS = ("layer_types", "layers_block_type", "mtp_layer_types", "mtp_layers_block_type")
NEWER = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
}
"""Older → newer word; newer classes take both and give the newer one."""
OLDER = {newer: older for older, newer in NEWER.items()}


def in_newer_words(settings: Settings) -> Settings:
    """Return the settings that an older config class gives as a newer one would."""
    found = _renamed(settings, NEWER)
    if str(found.get("model_type")).startswith("longcat"):
        found.pop("num_hidden_layers", None)  # LongCat's attentions, two for each layer.
    kind, rope = found.get("model_type"), found.get("rope_parameters")
    if isinstance(kind, str) and kind in _ROPES and isinstance(rope, Mapping):
        found["rope_parameters"] = _ROPES[kind](rope, found)
    return found


def in_older_words(config: Mapping[str, Any]) -> Settings:
    """Return a config whose kinds of layers have the older words, the section's too."""
    changed = _renamed(config, OLDER)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        changed["text_config"] = _renamed(text, OLDER)
    return changed


def _renamed(settings: Mapping[str, Any], words: Mapping[str, str]) -> Settings:
    return {
        key: [words.get(kind, kind) if isinstance(kind, str) else kind for kind in value]
        if key in KEYS and isinstance(value, list)
        else value
        for key, value in settings.items()
    }


def _by_kind(rope: Mapping[str, Any], settings: Settings) -> Settings:
    """Give the scaling to layers with full attention alone, as OLMo 3 was trained."""
    kinds = {kind: dict(value) for kind, value in rope.items() if isinstance(value, Mapping)}
    if not kinds:
        plain = {"rope_type": "default", "rope_theta": rope.get("rope_theta")}
        kinds = {"full_attention": dict(rope), "sliding_attention": plain}
    return kinds


def _of_rotary_dim(rope: Mapping[str, Any], settings: Settings) -> Settings:
    width, turned = settings.get("head_dim"), settings.get("rotary_dim")
    found = dict(rope)
    if isinstance(width, int) and isinstance(turned, int) and width > 0:
        found.setdefault("partial_rotary_factor", turned / width)
    return found


_ROPES: dict[str, Callable[[Mapping[str, Any], Settings], Settings]] = {
    "olmo3": _by_kind,
    "minimax_m2": _of_rotary_dim,
}
