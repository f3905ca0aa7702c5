"""Translations of ``config.json`` settings that several mlx-lm modules misread.

The config that they get is complete: ``plan.effective_config`` has filled in what transformers'
config class resolves. What is left is said in other words by the module. Each translation
changes the config in place where needed and returns whether it did. ``config`` is the whole
config, ``text`` its section for the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.row import SettingTranslation

Section = dict[str, Any]


def section(value: Any) -> Section:
    """Return the value if it is a dict, an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def kinds_of(text: Section, key: str) -> list[Any]:
    """Return the list under a key; empty if there is none."""
    value = text.get(key)
    return value if isinstance(value, list) else []


def computed(
    target: str,
    why: str,
    value: Callable[[Section], Any],
    *,
    always: bool = False,
    settings: tuple[str, ...] = (),
) -> SettingTranslation:
    """Return a translation that computes a key from the others.

    Args:
        target: the key.
        why: the setting that upstream misreads.
        value: takes the section for the language model; returns the key's value, or None if
            it cannot be computed.
        always: whether an existing value is replaced.
        settings: see ``SettingTranslation``.
    """

    def apply(config: Section, text: Section) -> bool:
        if text.get(target) is not None and not always:
            return False
        found = value(text)
        if found is None or text.get(target) == found:
            return False
        text[target] = found
        return True

    return SettingTranslation(target, why, apply, settings)


def renamed_layers(names: dict[str, str]) -> SettingTranslation:
    """Return a translation of the entries of ``layer_types``."""
    known = list(names)  # Not a set: entries of an untrusted config may be unhashable.

    def apply(config: Section, text: Section) -> bool:
        kinds = text.get("layer_types")
        if not isinstance(kinds, list) or not any(kind in known for kind in kinds):
            return False
        text["layer_types"] = [names[kind] if kind in known else kind for kind in kinds]
        return True

    return SettingTranslation(
        "layer_types", "kinds of layers are named " + ", ".join(names.values()), apply
    )


def _first_dense(text: Section) -> int | None:
    kinds = text.get("mlp_layer_types")
    if not isinstance(kinds, list):
        return None
    every = text.get("moe_layer_freq")
    every = every if isinstance(every, int) and every > 0 else 1
    dense = next((i for i, kind in enumerate(kinds) if kind == "sparse"), len(kinds))
    for index, kind in enumerate(kinds):
        if (kind == "sparse") != (index >= dense and index % every == 0):
            raise UnsupportedCheckpointError(
                f"config.json: mlp_layer_types has {kind!r} for layer {index}, where mlx-lm's "
                f"module has MoE layers from layer {dense} on, one in {every}; serve this model "
                "elsewhere than on MLX."
            )
    return dense


def _position(text: Section, kind: str = "full_attention") -> int | None:
    """Return the period of ``layer_types`` if ``kind`` ends each period, else None."""
    kinds = text.get("layer_types")
    if not isinstance(kinds, list) or kind not in kinds:
        return None
    period: int = kinds.index(kind) + 1
    regular = all((k == kind) == ((i + 1) % period == 0) for i, k in enumerate(kinds))
    return period if regular else None


def _rotary_dim(text: Section) -> int | None:
    width, part = text.get("head_dim"), text.get("partial_rotary_factor", 1.0)
    if not isinstance(width, int) or not 0 < width < 2**31:
        return None
    return int(width * part) if isinstance(part, int | float) and 0 <= part <= 1 else None


FIRST_DENSE = computed(
    "first_k_dense_replace",
    "mlp_layer_types is not read, and first_k_dense_replace is absent or stale",
    _first_dense,
    always=True,
)
ATTENTION_INTERVAL = computed(
    "full_attention_interval", "layer_types is not read", _position, always=True
)
WINDOW_PATTERN = computed(
    "sliding_window_pattern", "layer_types is not read", _position, always=True
)
DEEPSEEK_V2_YARN = computed(
    "rope_scaling",
    "a yarn dict is required even if the rotary embedding is not scaled; factor 1 is neutral",
    lambda text: {"type": "yarn", "factor": 1.0},
)
ROTARY_DIM = computed("rotary_dim", "partial_rotary_factor is not read", _rotary_dim)
ALL_ROTARY_DIM = computed(
    "rotary_dim", "rotary_dim is read before partial_rotary_factor", _rotary_dim, always=True
)
IS_MOE_LAYER = computed(
    "is_moe_layer",
    "mlp_layer_types is not read",
    lambda text: (
        [kind == "sparse" for kind in text["mlp_layer_types"]]
        if isinstance(text.get("mlp_layer_types"), list)
        else None
    ),
)
BLOCK_DIM = computed(
    "block_dim", "block_dim is read for hidden_size", lambda text: text.get("hidden_size")
)
BLOCK_FF_DIM = computed(
    "block_ff_dim",
    "intermediate_size is not read",
    lambda text: text.get("intermediate_size"),
    settings=("intermediate_size",),
)


def _all_sparse(config: Section, text: Section) -> bool:
    for key, plain in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if text.get(key) not in (None, plain):
            raise UnsupportedCheckpointError(
                f"config.json: {key} is {text[key]!r}, expected {plain!r}, since mlx-lm's module "
                "makes every layer a MoE layer; serve this model elsewhere than on MLX."
            )
    return False


ALL_SPARSE = SettingTranslation(
    "all-sparse", "dense layers between MoE layers cannot be represented", _all_sparse
)
