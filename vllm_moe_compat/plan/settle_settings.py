"""Settle what ``config.json`` says for a row's module: config, forward fixes, limits, refusals."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_moe_compat.families.fixes.fix import ForwardFix
from vllm_moe_compat.families.fixes.rotary_frequencies import keep_original_length
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.check_settings import check_settings
from vllm_moe_compat.plan.effective_config import Settings, effective_config, text_section
from vllm_moe_compat.plan.faults import Fault


@dataclass(frozen=True, slots=True)
class SettledSettings:
    """A config as settled for a module; the fields are those of ``PlannedLoad``."""

    config: dict[str, Any]
    settings: Settings = field(default_factory=dict)
    translated: tuple[str, ...] = ()
    fixes: tuple[tuple[ForwardFix, str], ...] = ()
    max_length: int | None = None
    max_length_reason: str = ""
    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()


def settle_settings(module: str, row: Row, config: Mapping[str, Any]) -> SettledSettings:
    """Settle a config for a row's module.

    Args:
        module: import path of the module.
        row: its row.
        config: the config as it was read.

    Raises:
        UnsupportedCheckpointError: the module cannot represent a setting.
    """
    made = effective_config(config)
    settings = made.settings
    keep_original_length(text_section(config), settings)
    fixes = _fixes(row, settings)
    longest, reason = _longest(row, settings)
    if any(fix.prepare for fix, _ in fixes):
        prepared = copy.deepcopy(dict(config))
        _prepare(prepared, fixes, settings)
        made = effective_config(prepared)
    given = {key for fix in row.fixes for key in fix.settings}
    given |= {key for translation in row.translations for key in translation.settings}
    faults, warnings = check_settings(module, config, settings, given)
    return SettledSettings(
        config=made.config,
        settings=settings,
        translated=made.translated,
        fixes=fixes,
        max_length=longest,
        max_length_reason=reason,
        faults=tuple(faults),
        warnings=tuple(warnings),
    )


def _fixes(row: Row, settings: Settings) -> tuple[tuple[ForwardFix, str], ...]:
    """Return the forward fixes that the settings need, with what each puts in."""
    each = ((fix, fix.needed(settings)) for fix in row.fixes)
    return tuple((fix, words) for fix, words in each if words is not None)


def _longest(row: Row, settings: Settings) -> tuple[int | None, str]:
    """Return the lowest of the row's limits of length, with its reason."""
    each = ((limit.longest(settings), limit.why) for limit in row.limits)
    found = [(tokens, why) for tokens, why in each if tokens is not None]
    return min(found, default=(None, ""))


def _prepare(
    config: dict[str, Any], fixes: tuple[tuple[ForwardFix, str], ...], settings: Settings
) -> None:
    """Change a config so that mlx-lm can build the module, in place."""
    text = config.get("text_config")
    for fix, _ in fixes:
        if fix.prepare is not None:
            fix.prepare(text if isinstance(text, dict) else config, settings)
