"""Rotary settings in old and new words.

transformers 5 says ``rope_parameters``, flat or one dict per kind of layer; releases and most
modules of mlx-lm say ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FLAT = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")


def flat_words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` in the old words.

    Where they are one dict per kind of layer, those of layers with full attention count, and
    ``rope_local_base_freq`` is the base of layers with a sliding window.
    """
    rope = settings.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    words: dict[str, Any] = {}
    if isinstance(full := rope.get("full_attention"), Mapping):
        sliding = rope.get("sliding_attention")
        if isinstance(sliding, Mapping) and sliding.get("rope_theta") is not None:
            words["rope_local_base_freq"] = sliding["rope_theta"]
        rope = full
    elif "rope_theta" not in rope and any(isinstance(v, Mapping) for v in rope.values()):
        return {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            words[key] = rope[key]
    rest = {
        key: value
        for key, value in rope.items()
        if key not in ("rope_theta", "partial_rotary_factor")
        and not key.startswith("mrope_")
        and not isinstance(value, Mapping)
    }
    kind = rest.get("rope_type", rest.get("type", "default"))
    words["rope_scaling"] = None if kind == "default" else {**rest, "type": kind}
    return words


def rope_parameters(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the old words as ``rope_parameters``; empty if there are none."""
    given = text.get("rope_scaling") or text.get("rope_parameters")
    rope = dict(given) if isinstance(given, Mapping) else {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        return rope
    for key in ("rope_theta", "partial_rotary_factor"):
        if text.get(key) is not None:
            rope.setdefault(key, text[key])
    if not rope:
        return {}
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        for key in ("original_max_position_embeddings", "max_position_embeddings"):
            if text.get(key) is not None:
                rope.setdefault("original_max_position_embeddings", text[key])
    return rope
