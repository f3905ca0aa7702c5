"""Experts in memory, as a source for ``CachedExperts``, and containers of every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from vllm_moe_compat.errors import CheckpointFileError, CompatError
from vllm_moe_compat.expert_cache.cached_experts import CachedExperts
from vllm_moe_compat.expert_cache.protocol import Bytes, Spec
from vllm_moe_compat.expert_cache.slots import Pending
from vllm_moe_compat.families.global_scale import take_global_scale


class MemorySource:
    """Experts that a resident container holds.

    Attributes:
        asked: the experts of each read, in order.
        broken: experts that cannot be read; what is written of them is garbage.
    """

    def __init__(self, container: nn.Module) -> None:
        """Take copies of the container's parameters."""
        arrays = {
            f"{name}.{key}": array
            for name, layer in container.items()
            if isinstance(layer, SwitchLinear | QuantizedSwitchLinear)
            for key, array in tree_flatten(layer.parameters())
        }
        self.experts = len(next(iter(arrays.values())))
        self.specs = {name: Spec(a.shape[1:], a.dtype) for name, a in arrays.items()}
        self.stored = {name: _bytes(a) for name, a in arrays.items()}
        self.nbytes = sum(stored[0].size for stored in self.stored.values())
        self.asked: list[list[int]] = []
        self.broken: set[int] = set()

    def read(
        self, experts: Sequence[int], into: Callable[[int], Mapping[str, Bytes]]
    ) -> dict[int, CompatError]:
        """Copy experts."""
        self.asked.append(list(experts))
        for expert in experts:
            for name, view in into(expert).items():
                # 0xFF is NaN as a float: it would show wherever it is computed with.
                view[:] = 0xFF if expert in self.broken else self.stored[name][expert]
        return {e: CheckpointFileError(f"expert {e} is torn") for e in experts if e in self.broken}


# Name: class, arguments, quantisation.
WIDTH, HIDDEN = 64, 96
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any] | None]] = {
    "glu": (SwitchGLU, {}, None),
    "glu, biases": (SwitchGLU, {"bias": True}, None),
    "glu, odd widths": (SwitchGLU, {"input_dims": 61, "hidden_dims": 37}, None),
    "glu, clipped": (SwitchGLU, {"activation": SwigluOAI(), "bias": True}, None),
    "mlp": (SwitchMLP, {}, None),
    "mlp, biases": (SwitchMLP, {"bias": True, "activation": nn.ReLU()}, None),
    "4 bits": (SwitchGLU, {}, {"bits": 4, "group_size": 32}),
    "8 bits, biases": (SwitchGLU, {"bias": True}, {"bits": 8, "group_size": 32}),
    "3 bits, mlp": (SwitchMLP, {}, {"bits": 3, "group_size": 32}),
    "mxfp4": (SwitchGLU, {"bias": True}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
    "mxfp8": (SwitchGLU, {}, {"bits": 8, "group_size": 32, "mode": "mxfp8"}),
    "nvfp4": (SwitchGLU, {}, {"bits": 4, "group_size": 16, "mode": "nvfp4"}),
    "nvfp4, global scale": (
        SwitchGLU,
        {"bias": True},
        {"bits": 4, "group_size": 16, "mode": "nvfp4", "global_scale": True},
    ),
}


def container(kind: str, experts: int, seed: int = 0) -> nn.Module:
    """Make a random container of one of ``KINDS``, evaluated."""
    made_by, arguments, quantization = KINDS[kind]
    sizes = {"input_dims": WIDTH, "hidden_dims": HIDDEN, "num_experts": experts}
    mx.random.seed(seed)
    made = made_by(**(sizes | arguments))
    for name, layer in list(made.items()):
        if not isinstance(layer, SwitchLinear):
            continue
        if "bias" in layer:
            layer.bias = mx.random.normal(layer.bias.shape)
        if quantization is not None:
            made[name] = _quantized(layer, **quantization)
    mx.eval(made.parameters())
    return made


def cached(
    resident: nn.Module, slots: int, *, layer: str = "experts", **options: Any
) -> tuple[CachedExperts, MemorySource]:
    """Return a copy of ``resident`` with ``slots``, of which none is filled yet."""
    source, taken = MemorySource(resident), copy(resident)
    for name, part in resident.items():
        taken[name] = copy(part)
    return CachedExperts(taken, source, slots, layer=layer, **options), source


def cache_experts(model: nn.Module, slots: int) -> dict[str, MemorySource]:
    """Give every container of a loaded model ``slots``; return the sources by path."""
    pending, sources = Pending(), {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, SwitchGLU | SwitchMLP):
            owner, _, name = path.rpartition(".")
            source = sources[path] = MemorySource(module)
            new = CachedExperts(module, source, slots, layer=path, pending=pending)
            new.fill()
            modules[owner][name] = new
    return sources


def _quantized(layer: SwitchLinear, *, global_scale: bool = False, **arguments: Any) -> nn.Module:
    if not global_scale:
        return layer.to_quantized(**arguments)
    take_global_scale(layer)
    quantized = layer.to_quantized(**arguments, global_scale=True)
    quantized.global_scale = mx.random.uniform(1000, 3000, quantized.global_scale.shape)
    return quantized


def _bytes(array: mx.array) -> Bytes:
    mx.eval(array)
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return np.array(array.view(unsigned)).reshape(len(array), -1).view(np.uint8)
