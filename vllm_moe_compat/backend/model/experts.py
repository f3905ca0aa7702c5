"""Matrix products of experts, and float32 weights for them on the CPU.

mlx-lm's ``SwitchLinear`` gathers each token's experts in one operation:

* quantised experts: ``gather_qmm``, on every device and dtype; unchanged.
* float experts on Metal and CUDA: ``gather_mm`` in the serving dtype; unchanged.
* float32 experts on the CPU: ``gather_mm``; unchanged.
* bfloat16 or float16 experts on the CPU: MLX's ``gather_mm`` supports only float32 there and
  fails when it is evaluated. The expert weights are widened to float32 once, at load, and the
  product is rounded to the dtype of the activations. That doubles the experts' bytes; the
  start-up line reports the addition.

A loop with one matrix product per expert is no alternative on the CPU: with 1 to 512 tokens and
16 to 64 experts it took 1.02 to 1.5 times as long as ``gather_mm``, and it reads the router's
choice back in every layer. 8-bit experts took 1.1 to 1.2 times as long.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear


class WidenedSwitchLinear(SwitchLinear):
    """``SwitchLinear`` with a float32 weight ``[E, O, I]`` for narrower activations.

    Attributes:
        narrow: the dtype whose values the weight has.
    """

    narrow: mx.Dtype

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Multiply in float32; return the result in the dtype of ``x``."""
        wide: mx.array = super().__call__(x.astype(mx.float32), indices, sorted_indices)
        return wide.astype(x.dtype)


def widen_experts(model: nn.Module) -> int:
    """Widen the expert weights that the device cannot multiply; return the bytes added."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return 0
    added = 0
    for module in _switch_linears(model):
        weight = module.weight
        if weight.dtype in (mx.bfloat16, mx.float16):
            narrow = weight.dtype
            module.weight = weight.astype(mx.float32)
            mx.eval(module.weight)
            added += weight.nbytes
            del weight
            # Only the product differs, not the parameters, so the module is kept.
            module.__class__ = WidenedSwitchLinear
            module.narrow = narrow
    return added


def _switch_linears(model: nn.Module) -> list[Any]:
    return [module for _, module in model.named_modules() if type(module) is SwitchLinear]
