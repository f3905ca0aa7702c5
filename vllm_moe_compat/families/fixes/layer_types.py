"""Kinds of layers as ``layer_types`` has them, for modules that count a period instead.

Some modules make every n-th layer a full-attention one, and the others windowed or linear. The
translations in ``families.settings`` turn a regular ``layer_types`` into that n. A pruned or
merged model follows no period. Its wrong layers are then made anew by the module's own class,
from arguments with a period by which this one layer is of the right kind: n = i + 1 for full
attention in layer i, n = i + 2 for the other kind. This happens before weights are loaded, and
MLX never evaluates the replaced ones.

What a module cannot be brought to compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings
from vllm_moe_compat.families.fixes.windows import (
    SLIDING,
    Windows,
    by_layer_types,
    owner_of_layers,
    sliding_windows,
)

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
        return f"the kinds of {len(kinds)} layers, which do not alternate by a period"

    def apply(model: Any, settings: Settings) -> None:
        owner, args = owner_of_layers(model), _args_with(model, period)
        for index, kind in enumerate(settings["layer_types"]):
            full = kind == FULL
            if full != ((index + 1) % getattr(args, period) == 0):
                own = replace(args, **{period: index + (1 if full else 2)})
                owner.layers[index] = type(owner.layers[index])(args=own, layer_idx=index)
        _set_first_of_each_kind(owner, settings)

    return ForwardFix(
        "layer-types",
        f"{period} is read instead of layer_types, which do not alternate by a period",
        ("layer_types",),
        needed,
        apply,
    )


def _args_with(model: Any, name: str) -> Any:
    """Return the arguments of the part of the model that have this field."""
    every = (getattr(part, "args", None) for part in model.modules())
    return next(args for args in every if hasattr(args, name))


def _set_first_of_each_kind(owner: Any, settings: Settings) -> None:
    """Set the layers from whose caches a hybrid module makes its masks; None for no layer."""
    kinds = settings["layer_types"]
    for name, full in (("fa_idx", True), ("ssm_idx", False)):
        if hasattr(owner, name):
            found = (i for i, kind in enumerate(kinds) if (kind == FULL) == full)
            setattr(owner, name, next(found, None))


def _is_periodic(settings: Settings) -> bool:
    """Return whether the translations give the module a period with both kinds of layers."""
    kinds = settings["layer_types"]
    if FULL not in kinds or len(set(kinds)) < 2:
        return False
    period = kinds.index(FULL) + 1
    return all((kind == FULL) == (i % period == 0) for i, kind in enumerate(kinds, start=1))


def _of_period(settings: Settings) -> Windows | None:
    """Return the windows that modules compute which count the period."""
    if not isinstance(settings.get("layer_types"), list):
        return ()
    return by_layer_types(settings) if _is_periodic(settings) else None


def needs(*required: str) -> ForwardFix:
    """Return the refusal of settings without a layer of each kind that a module looks up."""

    def needed(settings: Settings) -> str | None:
        kinds = settings.get("layer_types")
        if isinstance(kinds, list) and not set(required) <= set(kinds):
            raise UnsupportedCheckpointError(
                f"config.json: layer_types has {' and '.join(sorted(set(kinds)))} layers, where "
                f"mlx-lm's module expects {' and '.join(required)} ones; serve this model "
                "elsewhere than on MLX."
            )
        return None

    return _refusal("a layer of each kind is looked up", needed)


def _llama4(settings: Settings) -> str | None:
    """Refuse kinds of layers that do not alternate as in Llama 4's releases."""
    kinds, ropes = settings.get("layer_types"), settings.get("no_rope_layers")
    if not isinstance(kinds, list) or not isinstance(ropes, list):
        return None
    period = [(index + 1) % 4 != 0 for index in range(len(kinds))]
    step, sparse = settings.get("interleave_moe_layer_step"), settings.get("moe_layers")
    every = list(range(step - 1, len(kinds), step)) if isinstance(step, int) and step > 0 else []
    if isinstance(sparse, list) and sparse and sparse != every:
        raise UnsupportedCheckpointError(
            f"config.json: moe_layers is {sparse!r}, expected {every!r}, since mlx-lm's module "
            "counts these layers by a period; serve this model elsewhere than on MLX."
        )
    for key, found in (
        ("layer_types", [kind != FULL for kind in kinds]),
        ("no_rope_layers", [bool(rope) for rope in ropes]),
    ):
        if found != period or all(period):
            raise UnsupportedCheckpointError(
                f"config.json: {key} is {settings[key]!r}, where mlx-lm's module makes every "
                "fourth layer a full-attention one without rotary embedding, and at least one; "
                "serve this model elsewhere than on MLX."
            )
    return None


def _lightning(settings: Settings) -> str | None:
    """Refuse MiniMax's first models; the module of that name is MiniMax-M2's."""
    lists = [settings.get(key) for key in ("layer_types", "attn_type_list")]
    kinds = [kind for found in lists if isinstance(found, list) for kind in found]
    if any(kind in ("linear_attention", 0) for kind in kinds):
        raise UnsupportedCheckpointError(
            "config.json: it has layers with linear attention, expected full attention in all, "
            "since mlx-lm's minimax is the later MiniMax-M2; serve this model elsewhere than on "
            "MLX."
        )
    return None


def _refusal(why: str, needed: Callable[[Settings], str | None]) -> ForwardFix:
    return ForwardFix("layer-types", why, ("layer_types",), needed, lambda model, settings: None)


def _no_windows(settings: Settings) -> str | None:
    kinds = settings.get("layer_types")
    windowed = settings.get("sliding_window") is not None
    if not windowed or not isinstance(kinds, list) or SLIDING in kinds:
        return None
    return "no rotary embedding in full-attention layers"


def _without_rope(model: Any, settings: Settings) -> None:
    for layer in model.layers:
        layer.self_attn.use_rope = False


HYBRID = (layer_kinds("full_attention_interval"),)
"""Gated delta layers and softmax ones."""
WINDOWED = (
    layer_kinds("sliding_window_pattern"),
    sliding_windows(by_layer_types, _of_period),
)
"""Windowed layers and full ones, which also differ in their rotary embedding."""
EXAONE_MOE = ForwardFix(
    "layer-types",
    "layers without a window get a rotary embedding if no layer has a window",
    ("layer_types", "sliding_window"),
    _no_windows,
    _without_rope,
)
LLAMA_4 = _refusal("the kinds of layers have a fixed period", _llama4)
MINIMAX = _refusal("the module is shared with another model", _lightning)
