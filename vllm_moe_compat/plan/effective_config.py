"""The settings of a language model as transformers' own config class resolves them.

A file leaves out keys that hold the default, says some in two sections, and uses old and new
words for rotary settings. transformers resolves all that when it reads ``config.json``; its
config classes need no model code. The import takes seconds, so it happens when a config is
resolved, not before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

Settings = dict[str, Any]


def resolve(config: Mapping[str, Any]) -> Settings | None:
    """Return the language model's settings, defaults included; None without a class.

    Rotary settings are under ``rope_parameters``, kinds of layers under ``layer_types``.
    ``tie_word_embeddings`` is that of the whole model: transformers goes by the top level.

    Args:
        config: the config as it was read.
    """
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    whole = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(config)))
    settings: Settings = whole.get_text_config(decoder=True).to_dict()
    settings["tie_word_embeddings"] = whole.tie_word_embeddings
    return settings
