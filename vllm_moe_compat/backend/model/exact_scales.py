"""Keep the scales of packed weights exact, whatever the serving dtype.

A checkpoint's scales may have more digits than the serving dtype: float16 scales under
bfloat16, or float32 biases of zero points (``checkpoint.numbers.ints_op``). Cast to the serving
dtype they would be rounded, and every weight of a group would move. They are kept in float32
instead. MLX then multiplies in float32, and the product is rounded to the dtype of the
activations, so the rest of the model computes as ever. MLX's own quantisation, whose scales
have the dtype that is served, is not touched.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

_PARTS = ("scales", "biases")


class ExactLinear(nn.QuantizedLinear):
    """``QuantizedLinear`` with float32 scales for narrower activations."""

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply in float32; return the result in the dtype of ``x``."""
        wide: mx.array = super().__call__(x)
        return wide.astype(x.dtype)


class ExactSwitchLinear(QuantizedSwitchLinear):
    """``QuantizedSwitchLinear`` with float32 scales for narrower activations."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Multiply in float32; return the result in the dtype of ``x``."""
        wide: mx.array = super().__call__(x, indices, sorted_indices)
        return wide.astype(x.dtype)


class ExactEmbedding(nn.QuantizedEmbedding):
    """``QuantizedEmbedding`` with float32 scales; its rows have the dtype ``row_dtype``."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return the rows in the serving dtype."""
        wide: mx.array = super().__call__(x)
        return wide.astype(self.row_dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply in float32; return the result in the dtype of ``x``."""
        wide: mx.array = super().as_linear(x)
        return wide.astype(x.dtype)


_EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedLinear: ExactLinear,
    QuantizedSwitchLinear: ExactSwitchLinear,
    nn.QuantizedEmbedding: ExactEmbedding,
}


def keep_scales(model: nn.Module, dtype: mx.Dtype) -> set[str]:
    """Make the scales float32 that ``dtype`` cannot represent.

    Args:
        model: its weights may be unread.
        dtype: the serving dtype.

    Returns:
        The parameters that must keep their dtype.
    """
    kept: set[str] = set()
    for path, module in model.named_modules():
        found: Any = module
        if type(module) not in _EXACT or found.mode != "affine" or _is_exact(found.scales, dtype):
            continue
        # Only the product differs, not the parameters, so the module is kept.
        module.__class__ = _EXACT[type(module)]
        if isinstance(found, ExactEmbedding):
            found.row_dtype = dtype
        for part in _PARTS:
            found[part] = found[part].astype(mx.float32)
            kept.add(f"{path}.{part}")
    return kept


def _is_exact(scales: mx.array, dtype: mx.Dtype) -> bool:
    return scales.dtype == dtype or dtype == mx.float32
