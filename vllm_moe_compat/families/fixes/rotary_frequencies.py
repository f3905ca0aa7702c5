"""The rotary embedding that a config defines: frequencies and scale, in plain numbers.

The definitions are those of transformers (``modeling_rope_utils.ROPE_INIT_FUNCTIONS``), computed
in double precision: an embedding of ``D`` dimensions turns pair ``i`` of ``D/2`` by
``position * inverse[i]``, and multiplies what it turns by ``scale``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.config_classes import config_classes
from vllm_moe_compat.families.fixes.fix import Settings

Rope = Mapping[str, Any]
"""One entry of transformers' ``rope_parameters``."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotary embedding in numbers.

    Attributes:
        kind: transformers' ``rope_type``.
        dims: how many of a head's first dimensions are turned, ``D``.
        inverse: ``[D/2]``, radians per position; 0 for a pair that is not turned.
        scale: factor of the turned dimensions.
        length: longest sequence for which ``inverse`` and ``scale`` hold; None for all.
        long: ``[D/2]``, ``inverse`` beyond ``length``; empty where ``base`` grows instead.
        long_scale: ``scale`` beyond ``length``.
        base: base of the frequencies.
        factor: how the base grows beyond ``length`` (``dynamic``).
    """

    kind: str
    dims: int
    inverse: tuple[float, ...]
    scale: float = 1.0
    length: int | None = None
    long: tuple[float, ...] = ()
    long_scale: float = 1.0
    base: float = 10000.0
    factor: float = 1.0

    def equals(self, other: Rotary) -> bool:
        """Whether another embedding computes the same, up to rounding."""
        return self.dims == other.dims and all(
            math.isclose(a, b, rel_tol=1e-6)
            for a, b in zip((*self.inverse, self.scale), (*other.inverse, other.scale), strict=True)
        )


def ropes_of(settings: Settings) -> dict[str, Rope]:
    """Return the rotary settings per kind of layer; one entry named ``""`` for all layers."""
    rope = settings.get("rope_parameters")
    if settings.get("position_embedding_type") == "nope":
        return {}
    if not isinstance(rope, Mapping) or not rope:
        return _old_words(settings)
    nested = {kind: value for kind, value in rope.items() if isinstance(value, Mapping)}
    if not nested:
        original = settings.get(_ORIGINAL)  # Beside the rotary settings, it goes first.
        return {"": {**rope, _ORIGINAL: original} if original and _ORIGINAL in rope else rope}
    # transformers reads ``truncate`` beside the kinds, not inside them.
    truncate = {"truncate": rope.get("truncate", True)}
    return {
        kind: {**value, **truncate} if type_of(value) == "yarn" else value
        for kind, value in nested.items()
    }


_ORIGINAL = "original_max_position_embeddings"


def keep_original_length(text: Mapping[str, Any], settings: dict[str, Any]) -> None:
    """Put the original length into the settings where the file gives it and transformers not.

    Args:
        text: the section for the language model as it was read.
        settings: as transformers resolves it, changed in place. transformers takes the maximum
            for the original length of a Phi MoE whose file has it beside ``rope_scaling``.
    """
    if text.get(_ORIGINAL) and settings.get(_ORIGINAL):
        settings[_ORIGINAL] = text[_ORIGINAL]


def _old_words(settings: Settings) -> dict[str, Rope]:
    """Return ``rope_scaling`` and ``rope_theta`` of a family that transformers does not know."""
    scaling, theta = settings.get("rope_scaling"), settings.get("rope_theta")
    if not isinstance(scaling, Mapping) or not isinstance(theta, int | float):
        return {}
    part = settings.get("partial_rotary_factor")
    return {"": {"partial_rotary_factor": part, **scaling, "rope_theta": theta}}


def rope_of_layer(settings: Settings, ropes: Mapping[str, Rope], index: int | None) -> str | None:
    """Return the key in ``ropes`` for a decoder layer; None if the settings name none."""
    if "" in ropes:
        return ""
    kinds = settings.get("layer_types")
    if not isinstance(kinds, list | tuple) or index is None or index >= len(kinds):
        return None
    return kinds[index] if kinds[index] in ropes else None


def type_of(rope: Rope) -> str:
    """Return the type of rotary settings, by transformers' name."""
    name = rope.get("rope_type") or rope.get("type") or "default"
    return _ALIASES.get(name, name) if isinstance(name, str) else str(name)


_ALIASES = {"su": "longrope", "deepseek_yarn": "yarn", "telechat3-yarn": "yarn"}


def dims_of(rope: Rope, settings: Settings, kind: str) -> int:
    """Return how many dimensions of a head are turned in layers of a kind."""
    if settings.get("qk_rope_head_dim"):  # Latent attention keeps them apart.
        return int(settings["qk_rope_head_dim"])
    own, kinds = settings.get("per_layer_config"), settings.get("layer_types")
    if isinstance(own, Mapping) and isinstance(kinds, list | tuple) and kind in kinds:
        index = kinds.index(kind)
        settings = {**settings, **dict(own.get(str(index), own.get(index)) or {})}
    elif kind == "full_attention" and settings.get("global_head_dim"):
        settings = {**settings, "head_dim": settings["global_head_dim"]}  # Before 5.13.
    width = settings.get("head_dim")
    if not width:
        width = settings["hidden_size"] // settings["num_attention_heads"]
    part = rope.get("partial_rotary_factor")
    return int(width if part is None or type_of(rope) == "proportional" else width * part)


def rotary(rope: Rope, settings: Settings, kind: str = "") -> Rotary:
    """Return the embedding that a config defines.

    Args:
        rope: the rotary settings of the layers of this kind.
        settings: the language model's.
        kind: kind of the layers.

    Raises:
        UnsupportedCheckpointError: the type is unknown, or a number is missing or invalid.
    """
    name = type_of(rope)
    define = _DEFINITIONS.get(name)
    if define is None:
        raise UnsupportedCheckpointError(
            f"config.json: rope_parameters has the type {name!r}, where one of "
            f"{', '.join(_DEFINITIONS)} was expected; correct the config."
        )
    try:
        dims = dims_of(rope, settings, kind)
        return define(dims, float(rope["rope_theta"]), rope, settings)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise UnsupportedCheckpointError(
            f"config.json: rope_parameters is {dict(rope)!r}, where the numbers of the type "
            f"{name!r} were expected ({type(error).__name__}: {error}); correct the config."
        ) from error


def plain(dims: int, base: float) -> tuple[float, ...]:
    """Return the unscaled inverse frequencies ``[dims/2]``."""
    return tuple(base ** (-i / dims) for i in range(0, dims, 2))


def _default(dims: int, base: float, rope: Rope, settings: Settings) -> Rotary:
    return Rotary("default", dims, plain(dims, base), base=base)


def _linear(dims: int, base: float, rope: Rope, settings: Settings) -> Rotary:
    factor = float(rope["factor"])
    return Rotary("linear", dims, tuple(x / factor for x in plain(dims, base)), base=base)


def _proportional(dims: int, base: float, rope: Rope, settings: Settings) -> Rotary:
    part, factor = rope.get("partial_rotary_factor", 1.0), float(rope.get("factor", 1.0))
    turned = int(part * dims // 2)
    inverse = [x / factor for x in plain(dims, base)[:turned]]
    return Rotary("proportional", dims, (*inverse, *[0.0] * (dims // 2 - turned)), base=base)


def _dynamic(dims: int, base: float, rope: Rope, settings: Settings) -> Rotary:
    if rope.get("alpha"):  # Hunyuan's: the base is that of a length, once and for all.
        base *= float(rope["alpha"]) ** (dims / (dims - 2))
        return Rotary("dynamic", dims, plain(dims, base), base=base)
    length, factor = int(settings["max_position_embeddings"]), float(rope["factor"])
    return Rotary("dynamic", dims, plain(dims, base), length=length, base=base, factor=factor)


def _llama3(dims: int, base: float, rope: Rope, settings: Settings) -> Rotary:
    factor, length = float(rope["factor"]), float(rope[_ORIGINAL])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])

    def scaled(x: float) -> float:
        turns = length * x / (2 * math.pi)  # over the original length
        if turns < low:
            return x / factor
        if turns > high:
            return x
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * x / factor + smooth * x

    return Rotary("llama3", dims, tuple(map(scaled, plain(dims, base))), base=base)


def _yarn(dims: int, base: float, rope: Rope, settings: Settings) -> Rotary:
    length, factor = float(rope[_ORIGINAL]), rope.get("factor")
    if factor is None:
        factor = settings["max_position_embeddings"] / length
    factor = float(factor)
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1

    def dimension(turns: float) -> float:
        """Return the dimension that turns so often over the original length."""
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(fast), dimension(slow)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001

    def blended(i: int, x: float) -> float:
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        return x / factor * interpolated + x * (1 - interpolated)

    inverse = tuple(blended(i, x) for i, x in enumerate(plain(dims, base)))
    return Rotary("yarn", dims, inverse, _yarn_scale(rope, factor), base=base)


def _yarn_scale(rope: Rope, factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_mscale(factor, rope["mscale"]) / yarn_mscale(factor, rope["mscale_all_dim"])
    return yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's scale of the attention for a factor of the length."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(rope: Rope, settings: Settings) -> float | None:
    """Return the scale of latent attention's scores, which YaRN changes too; None without it."""
    plain_dims, turned = (settings.get(f"qk_{part}_head_dim") for part in ("nope", "rope"))
    if not isinstance(plain_dims, int) or not isinstance(turned, int) or not turned:
        return None
    scale, all_dim = 1 / math.sqrt(plain_dims + turned), rope.get("mscale_all_dim")
    if type_of(rope) == "default" or not all_dim:
        return scale
    return scale * yarn_mscale(float(rope["factor"]), float(all_dim)) ** 2


def _longrope(dims: int, base: float, rope: Rope, settings: Settings) -> Rotary:
    length, factor = int(rope[_ORIGINAL]), rope.get("factor")
    if factor is None:
        factor = settings["max_position_embeddings"] / length
    scale = rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    short, long = (_stretched(plain(dims, base), rope[key]) for key in _FACTORS)
    found = Rotary("longrope", dims, short, scale, length, long, scale, base)
    if settings.get("model_type") == "phimoe":  # The one family that scales by factors of its own.
        found = replace(found, scale=rope["short_mscale"], long_scale=rope["long_mscale"])
    return found


_FACTORS = ("short_factor", "long_factor")


def _stretched(inverse: tuple[float, ...], factors: Any) -> tuple[float, ...]:
    if len(factors) != len(inverse):
        raise ValueError(f"{len(factors)} factors for {len(inverse)} pairs of dimensions")
    return tuple(x / factor for x, factor in zip(inverse, factors, strict=True))


_DEFINITIONS = {
    "default": _default,
    "axial": _default,  # Positions of images: those of text are the same on all axes.
    "mrope": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


def is_transformers(settings: Settings) -> bool:
    """Whether transformers has a config class for the family, so that its definitions hold."""
    return settings.get("model_type") in config_classes()


def wanted(settings: Settings) -> Iterator[tuple[str, Rope, Rotary]]:
    """Yield kind of layers, rotary settings and embedding.

    Raises:
        UnsupportedCheckpointError: as ``rotary``.
    """
    for kind, rope in ropes_of(settings).items():
        yield kind, rope, rotary(rope, settings, kind)
