"""Linear layers of a cut model that can be quantised while they are loaded.

mlx-lm quantises a model after its tensors have names, and MLX's ``AllToShardedLinear`` and
``ShardedToAllLinear`` have no packed form. The first computes what ``nn.Linear`` does, so it
becomes one again. The second becomes a class whose packed form sums over the ranks too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.families.global_scale import MLX_GLOBAL, takes_global_scale


def make_packable(model: Any, before: Mapping[str, type]) -> None:
    """Give the cut linear layers of a model classes that have a packed form.

    Args:
        model: the cut model, unread.
        before: path → class of its modules before it was cut.
    """
    for path, module in model.named_modules():
        if type(module) is AllToShardedLinear:
            module.__class__ = before[path]
        elif type(module) is ShardedToAllLinear:
            scaled = takes_global_scale(before[path])
            module.__class__ = SummedLinearWithScale if scaled else SummedLinear


class SummedLinear(ShardedToAllLinear):  # type: ignore[misc]
    """``ShardedToAllLinear`` with a packed form."""

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> Any:
        """Return the packed layer, its values yet to be loaded."""
        return _packed(self, QuantizedShardedToAllLinear, group_size, bits, mode)


class SummedLinearWithScale(ShardedToAllLinear):  # type: ignore[misc]
    """The same, whose packed form may have a global scale."""

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
        global_scale: bool | None = None,
    ) -> Any:
        """Return the packed layer, its values yet to be loaded.

        Raises:
            UnsupportedServingError: it has a bias too.
        """
        if not (mode == "nvfp4" if global_scale is None else global_scale):
            return _packed(self, QuantizedShardedToAllLinear, group_size, bits, mode)
        if "bias" in self:
            raise UnsupportedServingError(
                "A linear layer with a bias and a global scale of NVFP4 cannot be divided over "
                "ranks; use tensor_parallel_size 1."
            )
        layer = _packed(self, QuantizedSummedLinearWithScale, group_size, bits, mode)
        layer.global_scale = mx.array(MLX_GLOBAL, dtype=mx.float32)
        return layer


class QuantizedSummedLinearWithScale(QuantizedShardedToAllLinear):  # type: ignore[misc]
    """``QuantizedShardedToAllLinear`` with ``global_scale``, float32 ``[]``."""

    def __call__(self, x: mx.array) -> mx.array:
        """``[…, I]`` to ``[…, O]``."""
        # Without the global scale, a product in float16 may overflow.
        y: mx.array = super().__call__(x.astype(mx.float32) if x.dtype == mx.float16 else x)
        scaled: mx.array = (y * (self["global_scale"] / MLX_GLOBAL)).astype(x.dtype)
        return scaled


def _packed(linear: Any, kind: Any, group_size: int | None, bits: int | None, mode: str) -> Any:
    layer = nn.QuantizedLinear.from_linear(linear, group_size, bits, mode)
    layer.group = linear.group
    layer.__class__ = kind
    return layer
