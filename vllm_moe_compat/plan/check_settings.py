"""Check a checkpoint's settings against what its module was seen to do with them.

A setting with a value that the module computes wrongly is a fault. A setting that nobody has
tried, with another value than transformers' default, is a warning: the load goes on, and says so.

What is recorded was seen with the newest mlx-lm. A setting that is read there is a word of the
module's source; an installed module without that word does not read it, which is a fault too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.modules import mlx_lm
from vllm_moe_compat.families.released_settings import is_released
from vllm_moe_compat.families.settings_record import (
    READ,
    ROPE,
    Class,
    allows,
    class_of,
    classes_of,
    named_settings,
)
from vllm_moe_compat.plan.effective_config import Settings, has_class, resolve, text_section
from vllm_moe_compat.plan.faults import Fault

OFF: tuple[Any, ...] = (None, False, [], {}, "")
"""Values that leave a feature out."""
REQUIRED, UNKNOWN = object(), object()
_LONGEST = 60


def check_settings(
    module: str, config: Mapping[str, Any], settings: Settings, otherwise: Collection[str] = ()
) -> tuple[list[Fault], list[Fault]]:
    """Return the faults and the warnings of a checkpoint's settings.

    Args:
        module: import path of the mlx-lm module.
        config: the config as it was read.
        settings: the language model's settings. Without a config class of transformers, or without
            a record of the module, nothing is refused, and keys of the file that the module's
            source does not name are warnings.
        otherwise: keys that the module gets by the row's fixes and translations.
    """
    faults: list[Fault] = []
    warnings: list[Fault] = []
    strange: list[str] = []
    classes = classes_of(module, settings.get("model_type"))
    resolved = bool(classes) and has_class(config)
    fixed = _fault if resolved else _warning
    given = text_section(config)
    name_of_module = module.rpartition(".")[2]
    named = dict(named_settings(settings))
    for name, value in named.items():
        found = class_of(classes, name)
        said = f"config.json: {name} is {_short(value)}"
        if not allows(found, value, named):
            message = f"{said}, where {name_of_module} computes {_values(found)}"
            (faults if resolved else warnings).append(fixed(message))
        elif found == READ and not (reads(module, name) or name in otherwise):
            message = f"{said}, which the installed mlx-lm's {name_of_module} does not read"
            if value not in OFF:  # A default may mean something, too.
                (faults if resolved else warnings).append(fixed(message))
        elif found is not None or value in OFF or is_released(name, value):
            continue
        elif resolved or name in given:
            default = _default(name, config) if resolved else UNKNOWN
            if default is UNKNOWN and not reads(module, name):
                strange.append(f"{name} = {_short(value)}")
            elif default is not UNKNOWN and default != value:
                message = f"{said}, and what {name_of_module} does with it has not been tried"
                warnings.append(_warning(message))
    if strange:
        readers = f"neither transformers nor {name_of_module} reads"
        readers = readers if resolved else f"{name_of_module} does not read"
        message = f"config.json has settings that {readers}: {', '.join(strange)}"
        warnings.append(_warning(message))
    return faults, warnings


def _fault(message: str) -> Fault:
    remedy = "serve this model elsewhere than on MLX"
    return Fault("setting-fixed", message, remedy, UnsupportedCheckpointError)


def _warning(message: str) -> Fault:
    remedy = "compare its answers with those of another server"
    return Fault("setting-unknown", message, remedy, UnsupportedCheckpointError)


def _default(name: str, config: Mapping[str, Any]) -> Any:
    """Return the value that transformers' class gives a setting that the file leaves out.

    ``UNKNOWN`` stands for a setting that the class does not have, ``REQUIRED`` for one that it
    cannot do without.
    """
    path = name.partition(" (")[0].split(".")
    other = copy.deepcopy(dict(config))
    for section in (other, other.get("text_config")):
        if isinstance(section, dict):
            _remove(section, path)
    try:
        return dict(named_settings(resolve(other))).get(name, UNKNOWN)
    except UnsupportedCheckpointError:
        return REQUIRED


def _remove(section: dict[str, Any], path: list[str]) -> None:
    """Remove a setting from a section, also where it is a rotary one under an older key."""
    places: list[Any] = [section]
    if path[0] == ROPE:
        places = [section, section.get(ROPE), section.get("rope_scaling")]
        nested = section.get(ROPE)
        if len(path) > 2 and isinstance(nested, dict):
            places.append(nested.get(path[1]))
    found = [place for place in places if isinstance(place, dict) and path[-1] in place]
    for place in found:
        del place[path[-1]]


def reads(module: str, name: str) -> bool:
    """Whether the source of a module, or of one that it imports, has a setting's key as a word."""
    return name.partition(" (")[0].rpartition(".")[2] in _words(module.rpartition(".")[2])


@cache
def _words(module: str) -> frozenset[str]:
    folder = mlx_lm().folder
    if folder is None or not (file := folder / f"{module}.py").is_file():
        return frozenset()
    source = _read(file)
    found = set(re.findall(r"\w+", source))
    for other in re.findall(r"^from \.(\w+) import|^from \. import (\w+)", source, re.MULTILINE):
        sibling = folder / f"{next(filter(None, other))}.py"
        found |= set(re.findall(r"\w+", _read(sibling))) if sibling.is_file() else set()
    return frozenset(found)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"


def _values(found: Class | None) -> str:
    if isinstance(found, dict):
        ((word, values),) = found.items()
        if word == "as":
            return f"as if it were {values[0]}"
        listed = " and ".join(map(_short, values))
        return f"anything but {listed}" if word == "not" else f"no layer with {listed}"
    return " or ".join(map(_short, found or ())) or "as if it were not there"
