"""Translations of ``config.json`` settings that several mlx-lm modules misread.

transformers 5 writes configs differently: rotary settings under ``rope_parameters``, other
names for counts, no key whose value is the default. mlx-lm then raises a ``TypeError``, or
uses a default of its own and generates nonsense. Each translation changes the config in place
where needed and returns whether it did. ``config`` is the whole config, ``text`` its section
for the language model.
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


def flat_rope(config: Section, text: Section) -> bool:
    """Translate ``rope_parameters`` into ``rope_theta`` and ``rope_scaling``."""
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return False
    before = dict(text)
    rest = {
        key: value
        for key, value in rope.items()
        if key not in ("rope_theta", "partial_rotary_factor") and not key.startswith("mrope_")
    }
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            text[key] = rope[key]
    kind = rest.get("rope_type", rest.get("type", "default"))
    if kind != "default":
        text["rope_scaling"] = {**rest, "type": kind}
    else:
        text.setdefault("rope_scaling", None)
    del text["rope_parameters"]
    return text != before


ROPE = SettingTranslation(
    "rope",
    "rope_parameters is not read: rope_theta and rope_scaling are missing or have defaults",
    flat_rope,
)


def _default(**values: Any) -> SettingTranslation:
    def apply(config: Section, text: Section) -> bool:
        missing = {k: v for k, v in values.items() if text.get(k) is None}
        text.update(missing)
        return bool(missing)

    return SettingTranslation("defaults", f"{', '.join(values)} must be present", apply)


def _copied(target: str, *sources: str) -> SettingTranslation:
    def apply(config: Section, text: Section) -> bool:
        value = next((text[s] for s in sources if text.get(s) is not None), None)
        if text.get(target) is not None or value is None:
            return False
        text[target] = value
        return True

    return SettingTranslation(
        target, f"{target} is read, and the config has {' or '.join(sources)}", apply
    )


def computed(
    target: str, why: str, value: Callable[[Section], Any], *, always: bool = False
) -> SettingTranslation:
    """Return a translation that computes a key from the others.

    Args:
        target: the key.
        why: the setting that upstream misreads.
        value: takes the section for the language model; returns the key's value, or None if
            it cannot be computed.
        always: whether an existing value is replaced.
    """

    def apply(config: Section, text: Section) -> bool:
        if text.get(target) is not None and not always:
            return False
        found = value(text)
        if found is None or text.get(target) == found:
            return False
        text[target] = found
        return True

    return SettingTranslation(target, why, apply)


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
    dense = next((i for i, kind in enumerate(kinds) if kind == "sparse"), len(kinds))
    return dense if all(kind == "sparse" for kind in kinds[dense:]) else None


def _position(text: Section, kind: str = "full_attention") -> int | None:
    """Return the period of ``layer_types`` if ``kind`` ends each period, else None."""
    kinds = text.get("layer_types")
    if not isinstance(kinds, list) or kind not in kinds:
        return None
    period: int = kinds.index(kind) + 1
    regular = all((k == kind) == ((i + 1) % period == 0) for i, k in enumerate(kinds))
    return period if regular else None


def _head_dim(text: Section) -> int | None:
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return None
    return hidden // heads


def _rotary_dim(text: Section) -> int | None:
    width, part = text.get("head_dim") or _head_dim(text), text.get("partial_rotary_factor", 1.0)
    if not isinstance(width, int) or not 0 < width < 2**31:
        return None
    return int(width * part) if isinstance(part, int | float) and 0 <= part <= 1 else None


NUM_EXPERTS = _copied("num_experts", "num_local_experts")
HEAD_DIM = computed("head_dim", "head_dim has another default", _head_dim)
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
MINIMAX = (
    computed("rotary_dim", "partial_rotary_factor is not read", _rotary_dim),
    _default(shared_intermediate_size=0),
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
LONGCAT = _default(
    attention_method="MLA",
    zero_expert_type="identity",
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)
NORM_TOPK = _default(norm_topk_prob=True)
SOLAR = _default(first_k_dense_replace=0, partial_rotary_factor=1.0)
GLM_DSA = _default(topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1)
BLOCK_DIM = _copied("block_dim", "hidden_size")
APERTUS = _default(mlp_bias=False, post_norm=False, qk_norm=True)


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


def _vocab_size(config: Section, text: Section) -> bool:
    size = text.get("vocab_size")
    if text is config or size is None or config.get("vocab_size") == size:
        return False
    config["vocab_size"] = size
    return True


VOCAB_SIZE = SettingTranslation(
    "vocab_size", "a default replaces the vocab_size of text_config", _vocab_size
)
