"""transformers' config class of a model, and what it makes of a config.

The config comes from the file of a stranger: whatever the class raises becomes one sentence that
names the key. Sections and keys that say nothing about the language model are not passed on.
The import takes seconds, so it happens when a config is resolved, not before.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families import modules
from vllm_moe_compat.families.config_classes import config_classes
from vllm_moe_compat.families.release_defaults import CLASS_OF
from vllm_moe_compat.plan.newer_words import in_newer_words, in_older_words

Settings = dict[str, Any]

MOST_LAYERS = 10_000
"""Classes make lists of one entry per layer, so a wrong number must not reach them."""
UNRELATED = frozenset(
    {
        *("vision_config", "audio_config", "quantization_config", "compression_config"),
        *("dtype", "torch_dtype", "id2label", "label2id", "num_labels", "problem_type"),
        *("auto_map", "transformers_version", "quantization", "_name_or_path"),
    }
)
"""Keys that say nothing about the language model's arithmetic."""

_FIELD = re.compile(r"for field '(\w+)'")


@dataclass(frozen=True, slots=True)
class ConfigClass:
    """A config class of transformers.

    Attributes:
        name: the class's name.
        cls: the class.
    """

    name: str
    cls: Any

    def read(self, config: Mapping[str, Any]) -> tuple[Settings, Mapping[str, str]]:
        """Return the language model's settings, and further names of them.

        Args:
            config: the whole config, as it was read.

        Raises:
            UnsupportedCheckpointError: the class refuses the config.
        """
        clean = _clean(config)
        _check_layers(clean)
        with _quiet():
            try:
                return self._read(clean)
            except Exception as error:
                older = in_older_words(clean)
                if older != clean and _takes(self._read, older):
                    return self._read(older)
                where = _culprit(self._read, clean, error)
                said = " ".join(str(error).split())[:200]
                raise UnsupportedCheckpointError(
                    f"config.json: {where}transformers' {self.name} refuses it "
                    f"({type(error).__name__}: {said}); correct the config or download it again."
                ) from error

    def _read(self, config: Mapping[str, Any]) -> tuple[Settings, Mapping[str, str]]:
        whole = self._text_class(config).from_dict(self._plain(config))
        text = whole.get_text_config(decoder=True)
        settings: Settings = text.to_dict()
        tied = getattr(whole, "tie_word_embeddings", settings.get("tie_word_embeddings"))
        if tied is not None:
            settings["tie_word_embeddings"] = tied
        return in_newer_words(settings), dict(type(text).attribute_map)

    def _plain(self, config: Mapping[str, Any]) -> Settings:
        """Return a copy with numbers in place of JSON's words for infinities."""
        decode = getattr(self.cls, "_decode_special_floats", lambda config: config)
        plain: Settings = decode(copy.deepcopy(dict(config)))
        return plain

    def _text_class(self, config: Mapping[str, Any]) -> Any:
        """Return the class, or its class of the section where a config has the section alone."""
        inner = getattr(self.cls, "sub_configs", {}).get("text_config")
        alone = not isinstance(config.get("text_config"), Mapping) and "hidden_size" in config
        return inner if alone and inner is not None and hasattr(inner, "to_dict") else self.cls


def config_class(config: Mapping[str, Any]) -> ConfigClass | None:
    """Return the config class for a ``model_type``; None if transformers has none.

    A type that mlx-lm maps to the module of another has that one's class.
    """
    known = _classes()
    kind = config.get("model_type")
    if known is None or not isinstance(kind, str):
        return None
    for name in (kind, CLASS_OF.get(kind), modules.mlx_lm().by_type.get(kind)):
        if name in known:
            cls = known[name]
            return ConfigClass(cls.__name__, cls)
    return None


def installed() -> bool:
    """Whether transformers can be imported."""
    return _classes() is not None


def leave_torch_out() -> None:
    """Import transformers without torch from here on, in a process that needs neither's models.

    Config classes do without it, and its import takes most of the time.
    """
    if not {"torch", "transformers"} & sys.modules.keys():
        _without.append("torch")


_without: list[str] = []


@cache
def _classes() -> Any:
    hidden: dict[str, Any] = dict.fromkeys(_without)
    try:
        if hidden:
            os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
            sys.modules.update(hidden)  # None: it is not there.
        return config_classes()
    except ImportError:
        return None
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def _clean(config: Mapping[str, Any]) -> Settings:
    return {
        key: _clean(value) if key == "text_config" and isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in UNRELATED
    }


def _check_layers(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key == "text_config" and isinstance(value, Mapping):
            _check_layers(value)
        elif "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise UnsupportedCheckpointError(
                f"config.json: {key} is {value!r}, where at most {MOST_LAYERS:,} was expected; "
                "correct the config or download it again."
            )


def _culprit(read: Callable[[Settings], Any], config: Settings, error: Exception) -> str:
    """Return the key that the class refuses, with its value, in words; empty for none.

    It is the key that the class names, or the one without which the class takes the config.
    """
    text = config.get("text_config")
    sections: list[tuple[Settings, Callable[[Settings], Settings]]] = [(config, lambda c: c)]
    if isinstance(text, dict):
        sections.insert(0, (text, lambda inner: {**config, "text_config": inner}))
    named = _FIELD.search(str(error))
    for section, whole in sections:
        for key, value in section.items():
            if key == (named[1] if named else key) and key != "model_type":
                without = whole({k: v for k, v in section.items() if k != key})
                if named or _takes(read, without):
                    shown = repr(value)
                    return f"{key} is {shown[:200]}{'…' * (len(shown) > 200)}, and "
    return ""


def _takes(read: Callable[[Settings], Any], config: Settings) -> bool:
    try:
        read(config)
    except Exception:  # noqa: BLE001 - an untrusted value may raise anything
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings about a config, which a load repeats, from the user."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
