"""What ``quantization_config`` says of packed integers.

Tensors decide the form, and mostly bits and groups; the config completes them: the bits of
compressed-tensors, whether GPTQ's zero points are stored less 1, whether columns are in act
order. Settings may differ per module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.errors import LayoutError

AUTO_ROUND = frozenset({"auto-round", "auto_round", "intel/auto-round"})
"""Values of ``quant_method`` that AutoRound writes."""


@dataclass(frozen=True, slots=True)
class IntSettings:
    """The settings of one module; None where the config does not tell.

    Attributes:
        bits: bits of an integer.
        group: columns under one scale; 0 for one scale per row.
        symmetric: whether all zero points are the middle.
        act_order: whether columns are in act order.
    """

    bits: int | None = None
    group: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A pattern of module names with the settings of these modules."""

    pattern: re.Pattern[str]
    settings: IntSettings


@dataclass(frozen=True, slots=True)
class IntConfig:
    """The integer settings of one config.

    Attributes:
        method: ``quant_method``; empty without one.
        usual: settings of modules without settings of their own.
        named: name of a module, or its last names → its settings; there may be thousands.
        targets: settings by pattern, for modules without a name; the first match counts.
        packing: ``gptq`` or ``awq``, if the config tells.
        minus_one: whether GPTQ's zero points are stored less 1.
        unknown: a setting whose value no form has, in words.
    """

    method: str = ""
    usual: IntSettings | None = None
    named: Mapping[str, IntSettings] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    packing: str = ""
    minus_one: bool = True
    unknown: str = ""

    def of(self, module: str) -> IntSettings | None:
        """Return the settings of a module; None if the config has none for it."""
        rest = module if self.named else ""
        while rest:
            if rest in self.named:
                return self.named[rest]
            rest = rest.partition(".")[2]
        for target in self.targets:
            if target.pattern.match(module):
                return target.settings
        return self.usual


def read_int_config(config: Mapping[str, Any]) -> IntConfig:
    """Read the integer settings of the outermost ``quantization_config``.

    Raises:
        LayoutError: a pattern is not a regular expression.
    """
    entry = next(iter(quantization_configs(config)), None)
    if entry is None:
        return IntConfig()
    method = entry.get("quant_method")
    method = method if isinstance(method, str) else ""
    if method == "compressed-tensors":
        return _schemes(entry)
    bits = _number(entry, "bits", "w_bit")
    group = _group(entry.get("group_size", entry.get("q_group_size")))
    symmetric = entry.get("sym")
    if method == "awq" and isinstance(entry.get("zero_point"), bool):
        symmetric = not entry["zero_point"]
    usual = IntSettings(bits, group, _flag(symmetric), _flag(entry.get("desc_act")))
    named, targets = _overrides(entry, usual)
    if method == "awq":
        version = str(entry.get("version") or "gemm").lower()
        unknown = "" if version == "gemm" else f"version {version!r}"
        return IntConfig(method, usual, named, targets, "awq", unknown=unknown)
    if method in AUTO_ROUND:
        packing = str(entry.get("packing_format") or "auto_round:auto_gptq")
        known = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
        unknown = "" if packing in known else f"packing_format {packing!r}"
        return IntConfig(method, usual, named, targets, known.get(packing, ""), unknown=unknown)
    written = str(entry.get("checkpoint_format") or "gptq").lower()
    unknown = "" if written in ("gptq", "gptq_v2") else f"checkpoint_format {written!r}"
    if entry.get("is_marlin_format"):
        unknown = "is_marlin_format"
    packing = "gptq" if method == "gptq" else ""
    return IntConfig(method, usual, named, targets, packing, written != "gptq_v2", unknown)


def _schemes(entry: Mapping[str, Any]) -> IntConfig:
    """Return the settings of compressed-tensors' integer groups."""
    groups = entry.get("config_groups")
    usual: IntSettings | None = None
    named: dict[str, IntSettings] = {}
    targets: list[Target] = []
    for scheme in groups.values() if isinstance(groups, Mapping) else ():
        weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
        if not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
            continue
        by_group = weights.get("strategy", "group" if weights.get("group_size") else "") == "group"
        settings = IntSettings(
            _number(weights, "num_bits") or 8,
            _group(weights.get("group_size")) if by_group else 0,
            _flag(weights.get("symmetric", True)),
            weights.get("actorder") in ("group", True, "dynamic"),
        )
        names = scheme.get("targets")
        for name in names if isinstance(names, list) else ["Linear"]:
            if not isinstance(name, str):
                continue
            if name.startswith("re:"):
                targets.append(Target(_pattern(name[3:]), settings))
            elif "." in name:
                named.setdefault(name, settings)
            else:  # The class of a layer, which nearly all configs name: Linear.
                usual = usual or settings
    return IntConfig("compressed-tensors", usual, named, tuple(targets))


def _overrides(
    entry: Mapping[str, Any], usual: IntSettings
) -> tuple[dict[str, IntSettings], tuple[Target, ...]]:
    """Return the settings of GPTQModel's ``dynamic`` and AutoRound's ``extra_config``."""
    named: dict[str, IntSettings] = {}
    targets: list[Target] = []
    dynamic = entry.get("dynamic")
    for key, values in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if isinstance(values, Mapping) and not key.startswith("-:"):
            targets.append(Target(_pattern(key.removeprefix("+:")), _changed(usual, values)))
    extra = entry.get("extra_config")
    for key, values in extra.items() if isinstance(extra, Mapping) else ():
        if not isinstance(values, Mapping):
            continue
        if re.fullmatch(r"[\w.\-]+", key):
            named[key] = _changed(usual, values)
        else:
            targets.append(Target(_pattern(key), _changed(usual, values)))
    return named, tuple(targets)


def _changed(usual: IntSettings, values: Mapping[str, Any]) -> IntSettings:
    group = _group(values.get("group_size"))
    symmetric, act_order = _flag(values.get("sym")), _flag(values.get("desc_act"))
    return IntSettings(
        _number(values, "bits") or usual.bits,
        usual.group if group is None else group,
        usual.symmetric if symmetric is None else symmetric,
        usual.act_order if act_order is None else act_order,
    )


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise LayoutError(
            f"config.json: quantization_config names modules by {text!r}, where a regular "
            f"expression was expected ({error}); download the config again or correct it."
        ) from error


def _number(entry: Mapping[str, Any], *keys: str) -> int | None:
    found = (entry.get(key) for key in keys)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)


def _group(value: Any) -> int | None:
    """Return columns per scale, 0 for whole rows (-1 in configs), None if unknown."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return max(value, 0)


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None
