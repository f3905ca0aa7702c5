"""Layers that multiply by the global scale of NVFP4.

A value of NVFP4 is ``E2M1 · scale · global scale``. MLX multiplies by the last in
``gather_qmm``, on GPUs only, and mlx-lm's ``QuantizedSwitchLinear`` has the parameter;
``nn.QuantizedLinear`` and ``quantized_matmul`` have none. Since ``x (g·W)ᵀ = g · x Wᵀ``, the
layers here multiply the product. Against dequantising to floats that costs 3.6 times less
memory, and in float32 on the CPU it takes two thirds of the time.

Only the instances of one model get these classes, those whose weights have a global scale;
mlx-lm then makes their quantised forms by ``to_quantized``. Before 0.32, it has no global scale
of experts either, and does not ask for one: then NVFP4 means one. Their parameter is MLX's: the
factor times 6 · 448, the product of the largest E2M1 and the largest E4M3.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from inspect import signature
from typing import Any

ENDING = ".global_scale"
MLX_GLOBAL = 6.0 * 448.0


def take_global_scales(model: Any, names: Collection[str]) -> None:
    """Make the model's layers take the global scales among ``names``.

    Args:
        model: the instance, not quantised yet.
        names: names of parameters; those that end in ``.global_scale`` count.
    """
    paths = {name.removesuffix(ENDING) for name in names if name.endswith(ENDING)}
    if not paths:
        return
    for path, module in model.named_modules():
        if path in paths:
            take_global_scale(module)


def take_global_scale(module: Any) -> None:
    """Make a linear layer or a layer of experts take a global scale; others stay as they are."""
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import SwitchLinear

    if type(module) in (nn.Linear, SwitchLinear):
        module.__class__ = _classes()[type(module)]


def takes_global_scale(kind: type) -> bool:
    """Whether a class of layers is one that ``take_global_scale`` gives."""
    return kind in _classes().values()


@cache
def _classes() -> dict[type, type]:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    upstream_scales = "global_scale" in signature(SwitchLinear.to_quantized).parameters

    def widened(x: Any) -> Any:
        """Widen float16, in which a product without the global scale may overflow."""
        return x.astype(mx.float32) if x.dtype == mx.float16 else x

    class QuantizedLinearWithScale(nn.QuantizedLinear):  # type: ignore[misc]
        """``nn.QuantizedLinear`` with ``global_scale``, float32 ``[]``."""

        def __call__(self, x: Any) -> Any:
            """``[…, I]`` to ``[…, O]``."""
            y = mx.quantized_matmul(
                widened(x),
                self["weight"],
                scales=self["scales"],
                transpose=True,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
            )
            y = (y * (self["global_scale"] / MLX_GLOBAL)).astype(x.dtype)
            return y + self["bias"] if "bias" in self else y

    class LinearWithScale(nn.Linear):  # type: ignore[misc]
        """``nn.Linear`` whose quantised form may have a global scale."""

        def to_quantized(
            self,
            group_size: int | None = None,
            bits: int | None = None,
            mode: str = "affine",
            quantize_input: bool = False,
            global_scale: bool | None = None,
        ) -> Any:
            """Return the quantised layer, its values yet to be loaded."""
            if not (mode == "nvfp4" if global_scale is None else global_scale):
                return super().to_quantized(group_size, bits, mode, quantize_input)
            layer = QuantizedLinearWithScale.from_linear(self, group_size, bits, mode)
            layer.global_scale = mx.array(MLX_GLOBAL, dtype=mx.float32)
            return layer

    class QuantizedExpertsWithScale(QuantizedSwitchLinear):  # type: ignore[misc]
        """``QuantizedSwitchLinear`` whose ``global_scale`` ``[E]`` works on the CPU as well."""

        def __call__(self, x: Any, indices: Any, sorted_indices: bool = False) -> Any:
            """``[…, 1, I]`` and the chosen experts ``[…, k]`` to ``[…, k, 1, O]``."""
            if upstream_scales and mx.default_device().type != mx.DeviceType.cpu:
                return super().__call__(x, indices, sorted_indices)
            y = mx.gather_qmm(
                widened(x),
                self["weight"],
                self["scales"],
                rhs_indices=indices,
                transpose=True,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
                sorted_indices=sorted_indices,
            )
            factor = (self["global_scale"] / MLX_GLOBAL)[indices]
            y = (y * factor[..., None, None]).astype(x.dtype)
            return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y

    class ExpertsWithScale(SwitchLinear):  # type: ignore[misc]
        """``SwitchLinear`` whose quantised form multiplies by its global scale on any device."""

        def to_quantized(
            self,
            group_size: int = 64,
            bits: int = 4,
            mode: str = "affine",
            global_scale: bool | None = None,
        ) -> Any:
            """Return the quantised layer, its values yet to be loaded."""
            if not (mode == "nvfp4" if global_scale is None else global_scale):
                return super().to_quantized(group_size, bits, mode)
            if upstream_scales:
                layer = super().to_quantized(group_size, bits, mode, global_scale=True)
            else:
                layer = super().to_quantized(group_size, bits, mode)
                layer.global_scale = mx.full(self.weight.shape[:1], MLX_GLOBAL)
            layer.__class__ = QuantizedExpertsWithScale
            return layer

    return {nn.Linear: LinearWithScale, SwitchLinear: ExpertsWithScale}
