"""The effective config: what transformers makes of ``config.json``, in mlx-lm's words.

A file leaves out keys that hold the default, says some in two sections, and uses old and new
words for rotary settings. transformers' own config class resolves all that; the defaults of
mlx-lm's modules are often others. So ``resolve`` asks the class, and ``effective_config`` gives
the module every setting that it reads and the file leaves out. What the file gives stays.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families import modules, registry
from vllm_moe_compat.families.arguments import (
    REQUIRED,
    UNKNOWN,
    Arguments,
    Defaults,
    arguments,
)
from vllm_moe_compat.families.release_defaults import WITHOUT_CLASS, release_defaults
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.config_class import ConfigClass, config_class, installed
from vllm_moe_compat.plan.rope_words import FLAT, flat_words, rope_parameters

Settings = dict[str, Any]

SYNONYMS = {"layer_types": ("layers_block_type", "hybrid_override_pattern", "full_attn_idxs")}
"""Setting → keys under which some modules read the same."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A language model's settings.

    Attributes:
        settings: see ``resolve``.
        further: the same values under the further names that the class knows them by, and
            values that follow from them.
        source: who resolved them, in words.
    """

    settings: Settings
    further: Settings
    source: str


@dataclass(frozen=True, slots=True)
class EffectiveConfig:
    """The config from which a module is built.

    Attributes:
        config: the effective config.
        settings: see ``resolve``.
        translated: ids of the translations that changed it and names of the settings that were
            filled in and differ from the module's default.
        source: who resolved the settings, in words.
    """

    config: dict[str, Any]
    settings: Settings
    translated: tuple[str, ...]
    source: str


def _given(section: Mapping[str, Any]) -> Settings:
    return {key: value for key, value in section.items() if value is not None}


def resolve(config: Mapping[str, Any]) -> Settings:
    """Return the language model's settings, defaults included, in transformers' words.

    Rotary settings are under ``rope_parameters``, kinds of layers under ``layer_types``.
    ``tie_word_embeddings`` is that of the whole model. Without a config class in transformers,
    they are the file's and the defaults that ``families.release_defaults`` records.

    Args:
        config: the config as it was read.

    Raises:
        UnsupportedCheckpointError: transformers' config class refuses the config.
    """
    return _resolve(config).settings


def has_class(config: Mapping[str, Any]) -> bool:
    """Whether a config class of transformers resolves the config."""
    return any(config_class(section) is not None for section in (config, text_section(config)))


def _resolve(config: Mapping[str, Any]) -> Resolved:
    cls = config_class(config)
    if cls is not None:
        return _of_class(cls, config)
    section = text_section(config)
    nested = section is not config and config.get("model_type") not in WITHOUT_CLASS
    inner = config_class(section) if nested else None
    if inner is not None:
        found = _of_class(inner, section)
    else:
        settings = copy.deepcopy(release_defaults(config) | _given(section))
        if rope := rope_parameters(settings):
            settings["rope_parameters"] = rope
        missing = "" if installed() else ", since transformers is not installed"
        found = Resolved(settings, flat_words(settings), f"recorded defaults{missing}")
    # The language model is a part with a head of its own here, so its section goes first.
    if section.get("tie_word_embeddings") is None and "tie_word_embeddings" in config:
        found.settings["tie_word_embeddings"] = config["tie_word_embeddings"]
    return found


def _of_class(cls: ConfigClass, config: Mapping[str, Any]) -> Resolved:
    settings, names = cls.read(config)
    _keep_unscaled(config, settings)
    further = {name: settings[key] for name, key in names.items() if key in settings}
    further |= flat_words(settings)
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if settings.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int):
        further["head_dim"] = hidden // max(heads, 1)
    return Resolved(settings, further, f"transformers' {cls.name}")


def _keep_unscaled(config: Mapping[str, Any], settings: Settings) -> None:
    """Undo the class's default scaling where the old words say that there is none, in place."""
    text = text_section(config)
    rope = settings.get("rope_parameters")
    said = "rope_scaling" in text and text["rope_scaling"] is None and "rope_parameters" not in text
    if said and isinstance(rope, dict) and rope.get("rope_type", "default") != "default":
        settings["rope_parameters"] = rope_parameters(
            {"rope_theta": rope.get("rope_theta"), **text}
        )


def effective_config(config: Mapping[str, Any]) -> EffectiveConfig:
    """Return the config from which the module of a row is built.

    Args:
        config: the config as it was read; there is a row for it.

    Raises:
        UnsupportedCheckpointError: transformers' config class refuses the config, the module
            cannot represent a setting, or nobody gives an argument that the module requires.
    """
    resolved = _resolve(config)
    row = modules.row_of_config(config)
    whole = copy.deepcopy(dict(config))
    nested = row is not None and registry.nest_text(row, whole)
    text = text_section(whole)
    given = dict(text)
    text |= copy.deepcopy(_missing(text, row, resolved))
    known = copy.deepcopy(text)
    translated = ["text_config"] if nested else []
    translated += [] if row is None else registry.translate_config(row, whole)
    module = modules.find(whole).path
    read = arguments(module, known.get("model_type")) or Arguments()
    text = text_section(whole)
    if text is whole:
        given = {**config, **given}
    if "head_dim" in resolved.further and read.text.get("head_dim", REQUIRED) is None:
        text.pop("head_dim", None)  # The module derives it in the same way.
    flat = "rope_theta" in read.text and "rope_theta" in text
    if flat and "rope_parameters" not in read.text:
        text.pop("rope_parameters", None)  # The old words say it all.
        if given.get("rope_parameters") is not None:
            given.setdefault("rope_scaling", None)  # Else a second reading scales by default.
    filled = _keep_what_is_read(text, given, known, read)
    if text is not whole:
        filled += _settle_whole(whole, text, resolved.settings, read)
    _check_required(whole, text, read, module)
    same = {k for k, v in read.text.items() if not _differs(given.get(k, v), text.get(k, v))}
    changed = dict.fromkeys([*(id for id in translated if id not in same), *sorted(filled)])
    return EffectiveConfig(whole, resolved.settings, tuple(changed), resolved.source)


def _settle_whole(
    whole: Settings, text: Settings, settings: Mapping[str, Any], read: Arguments
) -> list[str]:
    """Give the whole model's tying to the section, and the section's settings to the top level.

    Returns:
        The names of those that change what the module computes.
    """
    changed = []
    tied = settings.get("tie_word_embeddings")
    if tied is not None and "tie_word_embeddings" in read.text:
        if _differs(text.get("tie_word_embeddings", read.text["tie_word_embeddings"]), tied):
            changed.append("tie_word_embeddings")
        text["tie_word_embeddings"] = tied
    for key in read.whole.keys() & text.keys() - {"model_type", "text_config"}:
        if _differs(whole.get(key, read.whole[key]), text[key]):
            whole[key] = text[key]
            changed.append(key)
    return changed


def text_section(config: Any) -> Any:
    """Return the section for the language model; the config itself if nothing is nested."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _missing(text: Mapping[str, Any], row: Row | None, resolved: Resolved) -> Settings:
    """Return the settings that a section leaves out, and rotary ones that it says otherwise."""
    defaults = {} if row is None else dict(row.defaults)
    settings = _given(resolved.settings)
    rope = {k: resolved.further[k] for k in FLAT if k in resolved.further}
    known = {**resolved.settings, **defaults, **resolved.further, **settings, **rope}
    new_words = isinstance(text.get("rope_parameters"), Mapping)
    return {
        key: value
        for key, value in known.items()
        if text.get(key) is None or (new_words and key in rope and not isinstance(text[key], list))
    }


def _keep_what_is_read(
    text: Settings, given: Mapping[str, Any], known: Mapping[str, Any], read: Arguments
) -> list[str]:
    """Drop what the file does not give, unless a translation made it or the module reads it.

    Args:
        text: the section, complete and translated; changed in place.
        given: the section as it was read.
        known: the section before it was translated.
        read: the module's arguments.

    Returns:
        The names of the settings that stay and differ from the module's default.
    """
    nested = "rope_parameters" in read.text and not _reads_flat(given, read.text)
    filled = []
    for key in list(text):
        old = given.get(key)
        if key not in known or text[key] != known[key] or (old is not None and old == text[key]):
            continue  # A translation has made it, or the file gives it.
        spare = nested if key in FLAT else key == "rope_parameters" and not nested
        spare |= any(k in read.text and given.get(k) is not None for k in SYNONYMS.get(key, ()))
        if key not in read.text or spare or (key in given and text[key] is None):
            del text[key]
            if key in given:
                text[key] = old
        elif key in given or _differs(read.text[key], text[key]):
            filled.append(key)
        elif not read.whole:  # The class of a multimodal model has defaults of its own.
            del text[key]
    return filled


def _reads_flat(given: Mapping[str, Any], read: Defaults) -> bool:
    """Whether the file says, in the old words, what the module reads in either."""
    old = given.get("rope_theta") is not None and given.get("rope_parameters") is None
    return old and "rope_theta" in read and read["rope_parameters"] is not REQUIRED


def _differs(default: Any, value: Any) -> bool:
    return default is REQUIRED or default is UNKNOWN or bool(default != value)


def _check_required(
    whole: Mapping[str, Any], text: Mapping[str, Any], read: Arguments, module: str
) -> None:
    """Refuse a config without an argument that the module requires."""
    if read.whole and text is whole and not read.either:
        missing = ["text_config"]
    else:
        place = text if read.whole or read.either else whole
        missing = [k for k, v in read.text.items() if v is REQUIRED and k not in place]
        if text is not whole:
            missing += [k for k, v in read.whole.items() if v is REQUIRED and k not in whole]
    if missing:
        several = len(missing) > 1
        raise UnsupportedCheckpointError(
            f"config.json: {', '.join(missing)} {'are' if several else 'is'} missing, which "
            f"{module} requires; add {'them' if several else 'it'}, or download the config again."
        )
