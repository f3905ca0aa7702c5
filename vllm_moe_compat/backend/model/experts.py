"""How expert matrices are multiplied: the one place that chooses.

mlx-lm's ``SwitchLinear`` gathers each token's experts in one operation:

* quantised experts: ``gather_qmm``, on every device and dtype; left as it is.
* float experts on Metal and CUDA: ``gather_mm`` in the serving dtype; left.
* float32 experts on the CPU: ``gather_mm``; left.
* bfloat16 or float16 experts on the CPU: MLX's ``gather_mm`` computes float32
  only and fails when it is evaluated. The expert weights are widened to float32
  once, at load, and the product is rounded back to the activations' dtype. That
  doubles the experts' bytes, which the start-up line accounts for.

A loop over experts with one matrix product each is no alternative on the CPU:
from 1 to 512 tokens and 16 to 64 experts it took 1.02 to 1.5 times as long as
``gather_mm`` and reads the router's choice back on every layer; 8-bit experts
took 1.1 to 1.2 times as long.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear


class WidenedSwitchLinear(SwitchLinear):
    """``SwitchLinear`` whose weight ``[E, O, I]`` is float32 under narrower activations."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Multiply in float32; return the dtype of ``x``."""
        wide: mx.array = super().__call__(x.astype(mx.float32), indices, sorted_indices)
        return wide.astype(x.dtype)


def prepare(model: nn.Module) -> int:
    """Widen what the device cannot multiply; return the bytes that this added."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return 0
    added = 0
    for module in _switch_linears(model):
        weight = module.weight
        if weight.dtype in (mx.bfloat16, mx.float16):
            module.weight = weight.astype(mx.float32)
            mx.eval(module.weight)
            added += weight.nbytes
            del weight
            # The same parameters, another product: the class is all that differs.
            module.__class__ = WidenedSwitchLinear
    return added


def _switch_linears(model: nn.Module) -> list[Any]:
    return [module for _, module in model.named_modules() if type(module) is SwitchLinear]
