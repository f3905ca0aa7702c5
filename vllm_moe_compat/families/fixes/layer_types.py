"""Kinds of layers as ``layer_types`` has them, for modules that count a period instead.

Some modules make every n-th layer a full-attention one, and the others windowed or linear. The
translations of ``settings`` turn a regular ``layer_types`` into that n. A pruned or merged model
follows no period. Its wrong layers are then made anew by the module's own class, from arguments
with a period by which this one layer is of the right kind: n = i + 1 for full attention in layer
i, n = i + 2 for the other kind. This happens before weights are loaded, and MLX never evaluates
the replaced ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings
from vllm_moe_compat.families.fixes.windows import (
    Windows,
    by_layer_types,
    owner_of_layers,
    sliding_windows,
)
from vllm_moe_compat.families.settings import position

FULL = "full_attention"


def layer_kinds(period: str) -> ForwardFix:
    """Return the fix of a module that counts a period.

    Args:
        period: the module's argument for the period. Its layers take ``args`` and ``layer_idx``.
    """

    def needed(settings: Settings) -> str | None:
        kinds = settings.get("layer_types")
        if not isinstance(kinds, list) or _is_periodic(settings):
            return None
        return f"the kinds of {len(kinds)} layers, which follow no period"

    def apply(model: Any, settings: Settings) -> None:
        args = next(
            args for part in model.modules() if hasattr(args := getattr(part, "args", None), period)
        )
        owner = owner_of_layers(model)
        for index, (layer, kind) in enumerate(
            zip(owner.layers, settings["layer_types"], strict=True)
        ):
            full = kind == FULL
            if full != ((index + 1) % getattr(args, period) == 0):
                own = replace(args, **{period: index + (1 if full else 2)})
                owner.layers[index] = type(layer)(args=own, layer_idx=index)
        _set_first_of_each_kind(owner, settings)

    return ForwardFix(
        "layer-types",
        f"{period} is read instead of layer_types, which follow no period",
        ("layer_types",),
        needed,
        apply,
    )


def _set_first_of_each_kind(owner: Any, settings: Settings) -> None:
    """Set the layers from whose caches a hybrid module makes its masks; None for no layer."""
    kinds = settings["layer_types"]
    for name, full in (("fa_idx", True), ("ssm_idx", False)):
        if hasattr(owner, name):
            found = (i for i, kind in enumerate(kinds) if (kind == FULL) == full)
            setattr(owner, name, next(found, None))


def _is_periodic(settings: Settings) -> bool:
    return position(dict(settings)) is not None


def _of_period(settings: Settings) -> Windows:
    """Return what modules compute that count the period: they need both kinds."""
    windows = by_layer_types(settings) if _is_periodic(settings) else ()
    return windows if len(set(windows)) > 1 else ()


HYBRID = (layer_kinds("full_attention_interval"),)
"""Gated delta layers and softmax ones."""
WINDOWED = (
    layer_kinds("sliding_window_pattern"),
    sliding_windows(by_layer_types, _of_period),
)
"""Windowed layers and full ones, which also differ in their rotary embedding."""
