"""Queries, keys and values clipped to a range, as OLMoE's config may ask."""

from __future__ import annotations

from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings, become, named

_KEY = "clip_qkv"


def _needed(settings: Settings) -> str | None:
    limit = settings.get(_KEY)
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 0:
        raise UnsupportedCheckpointError(
            f"config.json: {_KEY} is {limit!r}, expected a number of at least 0 or null; correct "
            "the config."
        )
    return f"{_KEY} {limit}"


def _apply(model: Any, settings: Settings) -> None:
    for layer in model.layers:
        attention = layer.self_attn
        # The norms are the last step before queries and keys are split into heads.
        for part in (attention.q_norm, attention.k_norm, attention.v_proj):
            part.clip = settings[_KEY]
            become(part, _clipped)


def _clipped(original: Any) -> type:
    import mlx.core as mx

    class Clipped(original):  # type: ignore[misc]
        """A layer whose outputs are clipped to ``[-clip, clip]``."""

        def __call__(self, x: Any) -> Any:
            """``[…, I]`` to ``[…, O]``."""
            return mx.clip(super().__call__(x), -self.clip, self.clip)

        def to_quantized(self, *args: Any, **kwargs: Any) -> Any:
            """Return the quantised layer, clipped as well."""
            quantized = super().to_quantized(*args, **kwargs)
            quantized.clip = self.clip
            become(quantized, _clipped)
            return quantized

    return named(Clipped, original)


CLIP_QKV = ForwardFix(
    "clip-qkv", "queries, keys and values are not clipped", (_KEY,), _needed, _apply
)
