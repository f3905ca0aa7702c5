"""The epsilon of the norms of queries and keys in gated delta layers.

The reference adds 1e-6 to the sum of squares. Older modules of mlx-lm add it to their mean, which
is as much as adding it times the width, and differs where queries or keys are small.
"""

from __future__ import annotations

from types import FunctionType, SimpleNamespace
from typing import Any

from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings, become, named


def _apply(model: Any, settings: Settings) -> None:
    for part in model.modules():
        call = type(part).__call__
        if "Delta" in type(part).__name__ and isinstance(call, FunctionType):
            become(part, _with_sums)


def _with_sums(original: Any) -> type:
    """Return the class with its own forward pass, in which MLX's norm takes that epsilon.

    The norms are in the middle of the pass; a copy of it would not follow mlx-lm.
    """
    import mlx.core as mx

    def rms_norm(x: Any, weight: Any, eps: float, **kwargs: Any) -> Any:
        """Normalise ``[…, D]``; without a weight, ``eps`` is added to the sum of squares."""
        return mx.fast.rms_norm(x, weight, eps / x.shape[-1] if weight is None else eps, **kwargs)

    fast = SimpleNamespace(**{**vars(mx.fast), "rms_norm": rms_norm})
    core = SimpleNamespace(**{**vars(mx), "fast": fast})
    own = original.__call__

    class Delta(original):  # type: ignore[misc]
        """A gated delta layer with the reference's epsilon."""

        __call__ = FunctionType(
            own.__code__,
            {**own.__globals__, "mx": core},
            own.__name__,
            own.__defaults__,
            own.__closure__,
        )

    return named(Delta, original)


DELTA_NORMS = ForwardFix(
    "delta-norms",
    "queries and keys of gated delta layers are normed with another epsilon",
    (),
    lambda settings: "the epsilon of the norms in gated delta layers",
    _apply,
    slight=True,
)
