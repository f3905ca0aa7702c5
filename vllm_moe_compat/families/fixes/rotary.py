"""Rotary embeddings as the config says.

Many modules read a part of the rotary settings: unscaled embeddings alone, one kind of layers,
YaRN with a rounded range and without its own attention factor, LongRoPE's long factors. The
frequencies that transformers defines are compared with those that an instance computes, and
where they differ the embedding is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.errors import UnsupportedCheckpointError, UnsupportedServingError
from vllm_moe_compat.families.fixes.fix import ForwardFix, LengthLimit, Settings
from vllm_moe_compat.families.fixes.rotary_frequencies import (
    Rope,
    Rotary,
    is_transformers,
    rope_of_layer,
    ropes_of,
    rotary,
    softmax_scale,
    type_of,
    wanted,
    yarn_mscale,
)

PARTLY = "partly proportional"
_OTHER_TOWERS = ("vision", "visual", "audio")


class Place(NamedTuple):
    """Where an instance has a rotary embedding.

    Attributes:
        path: path of the embedding.
        owner: the module that calls it.
        key: its name there.
        rope: the embedding.
        layer: number of its decoder layer, if it is in one.
    """

    path: str
    owner: Any
    key: str
    rope: Any
    layer: int | None


def places(model: Any) -> Iterator[Place]:
    """Yield the rotary embeddings of a model's decoder layers."""
    modules = dict(model.named_modules())
    for path, part in modules.items():
        owner, _, key = path.rpartition(".")
        name = type(part).__name__.lower()
        if not ("rope" in name or "rotary" in name) or part.parameters():
            continue
        if owner in modules and not any(tower in path for tower in _OTHER_TOWERS):
            layer = layer_of(path)
            yield Place(path, modules[owner], key, part, layer.number if layer else None)


def rotary_fix(*follows: str, plain: tuple[str, ...] = (), softmax: bool = True) -> ForwardFix:
    """Return the fix for a module.

    Args:
        *follows: the types, beside the default one, that the module computes itself;
            ``proportional`` means those that turn every pair, ``PARTLY`` the others too.
        plain: kinds of layers where it computes the default type only.
        softmax: whether ``mscale_all_dim`` scales its latent attention.
    """

    def needed(settings: Settings) -> str | None:
        found = [
            _describe(kind, rope)
            for kind, rope, embedding in wanted(settings)
            if not _followed(kind, rope, embedding, settings)
        ]
        return " and ".join(found) or None

    def _followed(kind: str, rope: Rope, embedding: Rotary, settings: Settings) -> bool:
        if embedding.kind == "default":
            return True
        if kind in plain or not _built(rope, embedding):
            return False
        if not softmax and rope.get("mscale_all_dim"):
            return False
        if embedding.kind == "proportional":
            return all(embedding.inverse) or PARTLY in follows
        # Upstream's YaRN rounds its range, and has one formula for its factor.
        return not is_transformers(settings) or embedding.equals(_upstream(rope, settings, kind))

    def prepare(text: dict[str, Any], settings: Settings) -> None:
        """Have the module built unscaled, where it would refuse the type or be replaced anyway."""
        if not all(_built(rope, embedding) for _, rope, embedding in wanted(settings)):
            if text.get("rope_scaling") is not None:
                text["rope_scaling"] = None
            rope = text.get("rope_parameters")
            if isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values()):
                text["rope_parameters"] = {**rope, "rope_type": "default", "type": "default"}

    def _built(rope: Rope, embedding: Rotary) -> bool:
        complete = embedding.kind != "yarn" or rope.get("factor") is not None
        return complete and embedding.kind in ("default", *follows) and embedding.length is None

    def apply(model: Any, settings: Settings) -> None:
        from vllm_moe_compat.families.fixes.rotary_embedding import RotaryEmbedding, computes

        made: dict[tuple[Rotary, bool], RotaryEmbedding] = {}
        found = list(_wanted_at(model, settings))
        if not found:
            raise UnsupportedCheckpointError(
                f"config.json: it has rotary settings ({needed(settings)}), and "
                f"{type(model).__module__} has no rotary embedding that they could be put into; "
                "report the checkpoint."
            )
        for place, want, scale in found:
            pairs = _interleaved(place.rope)
            if not computes(place.rope, want, pairs):
                new = made.setdefault((want, pairs), RotaryEmbedding(want, pairs))
                setattr(place.owner, place.key, new)
            name = _scale_name(place.owner)
            if scale is not None and name and not _close(getattr(place.owner, name), scale):
                setattr(place.owner, name, scale)

    return ForwardFix(
        "rotary",
        "the module computes other rotary embeddings than the config defines",
        ("rope_parameters",),
        needed,
        apply,
        prepare,
    )


def _dynamic_length(settings: Settings) -> int | None:
    each = (embedding for _, _, embedding in wanted(settings))
    return min((e.length for e in each if e.kind == "dynamic" and e.length), default=None)


DYNAMIC_LIMIT = LengthLimit(
    "rotary",
    "the dynamic rotary embedding changes with every token, for all sequences of a batch",
    ("rope_parameters", "max_position_embeddings"),
    _dynamic_length,
)


def _upstream(rope: Rope, settings: Settings, kind: str) -> Rotary:
    """Return what ``mlx_lm.models.rope_utils`` makes of rotary settings."""
    own = {**rope, "truncate": True}
    if type_of(rope) == "yarn":
        factor, one, all_dim = own["factor"], own.get("mscale", 1), own.get("mscale_all_dim", 0)
        own["attention_factor"] = yarn_mscale(factor, one) / yarn_mscale(factor, all_dim)
    return rotary(own, settings, kind)


def _describe(kind: str, rope: Rope) -> str:
    """Return words for rotary settings: ``rotary embedding yarn (factor 4)``."""
    name = type_of(rope)
    hidden = ("rope_type", "type", "rope_theta")
    told = ", ".join(
        f"{key} {value}"
        for key, value in rope.items()
        if key not in hidden and isinstance(value, int | float | bool)
    )
    layers = f" of {kind} layers" if kind else ""
    beyond = {
        "longrope": "; short factors up to the original length, long ones beyond it",
        "dynamic": "; as without scaling up to max_position_embeddings",
    }.get(name, "")
    return f"rotary embedding{layers} {name}{f' ({told})' if told else ''}{beyond}"


def _wanted_at(model: Any, settings: Settings) -> Iterator[tuple[Place, Rotary, float | None]]:
    """Yield each embedding of an instance with the one that the settings define.

    The third value is the scale of latent attention's scores, None for other attention.
    """
    ropes = ropes_of(settings)
    for place in places(model):
        kind = rope_of_layer(settings, ropes, place.layer)
        if kind is not None:
            rope = ropes[kind]
            yield place, rotary(rope, settings, kind), softmax_scale(rope, settings)


def _scale_name(owner: Any) -> str:
    """Return the name of an attention's scale of scores; empty for an indexer."""
    names = ("scale", "softmax_scale") if hasattr(owner, "o_proj") else ()
    return next((name for name in names if isinstance(getattr(owner, name, None), float)), "")


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * abs(b)


def _interleaved(rope: Any) -> bool:
    """Whether an embedding's pairs are neighbouring dimensions."""
    named = type(rope).__name__ == "DeepseekV2YarnRotaryEmbedding"
    return bool(getattr(rope, "traditional", named))


def check(model: Any, settings: Settings) -> None:
    """Check that every rotary embedding computes what transformers' settings define.

    Raises:
        UnsupportedCheckpointError: one does not, so that a module was misunderstood.
    """
    from vllm_moe_compat.families.fixes.rotary_embedding import computes

    if not is_transformers(settings):
        return  # Nobody but the module defines them.
    for place, want, scale in _wanted_at(model, settings):
        name = _scale_name(place.owner)
        wrong = ""
        if not computes(place.rope, want, _interleaved(place.rope)):
            wrong = f"{place.path} computes other rotary frequencies"
        elif scale is not None and name and not _close(getattr(place.owner, name), scale):
            wrong = f"{name} beside {place.path} is {getattr(place.owner, name)}, not {scale}"
        if wrong:
            raise UnsupportedCheckpointError(
                f"config.json: rope_parameters is {settings.get('rope_parameters')!r}, and in "
                f"{type(model).__module__} {wrong}; report the checkpoint, or correct the config."
            )


def settle(model: Any, longest: int) -> str:
    """Choose, for all sequences of a server, the frequencies that depend on the length.

    Args:
        model: the instance.
        longest: the longest sequence that it will see.

    Returns:
        The choice in words; empty if nothing depends on the length.

    Raises:
        UnsupportedServingError: the frequencies would change with every token.
    """
    from vllm_moe_compat.families.fixes.rotary_embedding import RotaryEmbedding

    words = ""
    for place in places(model):
        rope = place.rope
        if not isinstance(rope, RotaryEmbedding) or rope.rotary.length is None:
            continue
        rope.longest, length = longest, rope.rotary.length
        if longest > length and rope.rotary.kind == "dynamic":
            raise UnsupportedServingError(
                f"max_model_len is {longest}, and beyond {length} tokens the dynamic rotary "
                f"embedding changes with every token; serve with --max-model-len {length}."
            )
        which = "long" if longest > length else "short"
        if rope.rotary.kind == "longrope":
            words = (
                f"the {which} factors of LongRoPE are in force, since max_model_len is {longest} "
                f"and the original length {length}"
            )
    return words
