"""The mlx-lm modules that the package serves.

``TRANSFORMS_BY_MODULE`` is explicit: a module without a row is never touched. Rows of MoE
modules are in ``moe`` and ``deepseek``, those of dense modules in ``dense``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moe_compat.families import settings_by_family
from vllm_moe_compat.families.deepseek import DEEPSEEK_ROWS
from vllm_moe_compat.families.dense import DENSE_ROWS
from vllm_moe_compat.families.moe import MOE_ROWS
from vllm_moe_compat.families.row import Row

TRANSFORMS_BY_MODULE: dict[str, Row] = {
    row.module: row for row in (*MOE_ROWS, *DEEPSEEK_ROWS, *DENSE_ROWS)
}
"""Import path of an mlx-lm module → its row."""

_BY_MODEL_TYPE = {
    name: row
    for row in TRANSFORMS_BY_MODULE.values()
    for name in (*row.model_types, *row.text_types)
}


def row_for(model_class: type) -> Row | None:
    """Return the row that covers the class's ``sanitize``, or None.

    A class that inherits ``sanitize`` is covered by its parent's row; a class that overrides it
    needs a row of its own.
    """
    for ancestor in model_class.__mro__:
        row = TRANSFORMS_BY_MODULE.get(ancestor.__module__)
        if row is not None and ancestor.__name__ == "Model":
            return row
        if "sanitize" in ancestor.__dict__:
            return None
    return None


def row_of_model_type(config: Mapping[str, Any], remapping: Mapping[str, str]) -> Row | None:
    """Return the row for a config's ``model_type``, or None.

    Args:
        config: the checkpoint's.
        remapping: mlx-lm's table of model types whose module has another name.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    if kind == "llama4_text" and not settings_by_family.has_llama4_experts(config):
        return None  # mlx-lm has a module of that name for dense models.
    if kind in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[kind]
    return TRANSFORMS_BY_MODULE.get(f"mlx_lm.models.{remapping.get(kind, kind)}")


def nest_text(row: Row, config: dict[str, Any]) -> bool:
    """Put the settings of a language model saved by itself under ``text_config``, in place.

    Returns:
        Whether it was one whose module wants them there.
    """
    alone = config.get("model_type") in row.text_types and "text_config" not in config
    if alone:
        kept = ("quantization", "quantization_config")
        config["text_config"] = {key: config[key] for key in config if key not in kept}
    return alone


def name_module(row: Row, config: dict[str, Any]) -> bool:
    """Set a ``model_type`` that only the row knows to the module's name, in place.

    Returns:
        Whether it was one.
    """
    nest_text(row, config)
    known = config.get("model_type") in (*row.model_types, *row.text_types)
    if known:
        config["model_type"] = row.module.rpartition(".")[2]
    return known


def translate_config(row: Row, config: dict[str, Any]) -> list[str]:
    """Translate a config's settings for the row's module, in place.

    Returns:
        The ids of the translations that changed the config.

    Raises:
        UnsupportedCheckpointError: the module cannot represent a setting.
    """
    changed = []
    for translation in row.translations:
        text = config.get("text_config")
        if translation.apply(config, text if isinstance(text, dict) else config):
            changed.append(translation.id)
    return ["model_type", *changed] if name_module(row, config) else changed
