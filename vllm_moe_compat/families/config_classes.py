"""transformers' own config classes, by ``model_type``.

vLLM registers classes of its own in transformers' table, also in place of those that it finds
there. They know other keys and defaults, and a process without vLLM, as that of ``inspect``, does
not have them. So the table is made anew from transformers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any


@cache
def config_classes() -> Mapping[str, Any]:
    """Return the classes, each imported when it is looked up.

    Raises:
        ImportError: transformers cannot be imported.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    table: Mapping[str, Any] = type(CONFIG_MAPPING)(CONFIG_MAPPING_NAMES)
    return table
