"""What attention and its callers lack in older modules."""

from __future__ import annotations

from typing import Any

from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings, become, named

_SCALE, _PAIRS = "attention_value_scale", "indexer_rope_interleave"


def _scaled(settings: Settings) -> str | None:
    scale = settings.get(_SCALE)
    return None if scale in (None, 1) else f"{_SCALE} {scale}"


def _scale_values(model: Any, settings: Settings) -> None:
    for layer in model.layers:
        layer.self_attn.value_scale = settings[_SCALE]
        become(layer.self_attn, _with_scaled_values)


def _with_scaled_values(original: Any) -> type:
    class Attention(original):  # type: ignore[misc]
        """Attention whose values are scaled: its output is linear in them, without a bias."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """``[B, L, H]`` to ``[B, L, H]``."""
            return super().__call__(*args, **kwargs) * self.value_scale

    return named(Attention, original)


def indexer_halves(*, pairs: bool) -> ForwardFix:
    """Return the fix of an indexer that turns pairs, whatever the config says.

    Args:
        pairs: whether a config that says nothing means pairs.
    """

    def needed(settings: Settings) -> str | None:
        return None if settings.get(_PAIRS, pairs) else "an indexer that turns halves of heads"

    return ForwardFix(
        "indexer-halves", "the indexer turns pairs of neighbours", (_PAIRS,), needed, _turn_halves
    )


def _turn_halves(model: Any, settings: Settings) -> None:
    for layer in model.layers:
        layer.self_attn.indexer.rope.traditional = False


def _without_cache(model: Any, settings: Settings) -> None:
    become(model.model, _with_all_layers)


def _with_all_layers(original: Any) -> type:
    class Decoder(original):  # type: ignore[misc]
        """A decoder that runs all of its layers without a cache, too."""

        def __call__(self, inputs: Any, cache: Any = None) -> Any:
            """``[B, L]`` to ``[B, L, H]``."""
            if cache is None:
                cache = [(None, None)] * len(self.layers)
            return super().__call__(inputs, cache)

    return named(Decoder, original)


VALUE_SCALE = ForwardFix("value-scale", f"{_SCALE} is not read", (_SCALE,), _scaled, _scale_values)
ALL_LAYERS = ForwardFix(
    "all-layers",
    "without a cache, the first layer alone is computed",
    (),
    lambda settings: "all layers into a pass without a cache",
    _without_cache,
)
