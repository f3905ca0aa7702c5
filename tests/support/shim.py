"""A stand-in for the wrapper that vllm-metal puts round two Qwen3.5 classes.

It behaves as that one does: eager (it imports the models to wrap them), lazy in MLX's sense
(nothing is evaluated), with a mark on its function that keeps it from wrapping twice. It

* takes every ``weight_scale_inv`` for that of FP8 in blocks of 128, refuses other grids and
  scales without a weight, and multiplies scales in E8M0 as if the bytes were numbers;
* refuses compressed-tensors;
* stacks per-expert tensors into the combined form that upstream splits again, in bfloat16,
  wherever they are: prediction heads and vision towers are judged, too.

It never takes itself out; ``install`` returns what does that for the tests.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection
from typing import Any

import mlx.core as mx

MODULES = ("mlx_lm.models.qwen3_5", "mlx_lm.models.qwen3_5_moe")
MARK = "_stand_in_shim"
PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def install(modules: Collection[str] = MODULES) -> Callable[[], None]:
    """Wrap the modules' classes; return what puts back what was there."""
    undo = []
    for name in modules:
        model = importlib.import_module(name).Model
        if getattr(model.sanitize, MARK, False):
            continue
        undo.append((model, model.sanitize))
        model.sanitize = _wrap(model.sanitize)

    def remove() -> None:
        for model, original in undo:
            model.sanitize = original

    return remove


def _wrap(inner: Any) -> Any:
    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return inner(self, _stack(_dequantize(weights)))

    setattr(sanitize, MARK, True)
    return sanitize


def _dequantize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    if any(name.endswith((".weight_scale", ".weight_packed")) for name in weights):
        raise ValueError("compressed-tensors weights are not supported")
    scales = [name for name in weights if name.endswith("_scale_inv")]
    out = {name: value for name, value in weights.items() if name not in scales}
    for name in scales:
        weight = name.removesuffix("_scale_inv")
        if weight not in weights:
            raise ValueError(f"{name} has no weight")
        out[weight] = _product(weight, weights[weight], weights[name])
    return out


def _product(name: str, value: mx.array, scale: mx.array) -> mx.array:
    *lead, rows, columns = value.shape
    if tuple(scale.shape) != (*lead, -(-rows // 128), -(-columns // 128)):
        raise ValueError(f"{name} has scales {scale.shape}, where blocks of 128 were expected")
    edges = [(0, 0)] * len(lead) + [(0, -rows % 128), (0, -columns % 128)]
    value = mx.pad(mx.from_fp8(value), edges)
    tiles = value.reshape(*lead, scale.shape[-2], 128, scale.shape[-1], 128)
    value = (tiles * scale[..., :, None, :, None]).reshape(value.shape)
    return value[..., :rows, :columns].astype(mx.bfloat16)


def _stack(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    found: dict[str, dict[str, dict[int, mx.array]]] = {}
    out = {}
    for name, value in weights.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            out[name] = value
        else:
            found.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = value
    for prefix, kinds in found.items():
        if missing := PROJECTIONS - kinds.keys():
            raise ValueError(
                f"Per-expert MoE weights at {prefix!r} are missing projection families: "
                f"{sorted(missing)}"
            )
        if any(sorted(experts) != list(range(len(experts))) for experts in kinds.values()):
            raise ValueError(f"Per-expert MoE weights at {prefix!r} are not contiguous")
        stacks = {k: mx.stack([v[e] for e in range(len(v))]) for k, v in kinds.items()}
        halves = [stacks["gate_proj"], stacks["up_proj"]]
        out[f"{prefix}.gate_up_proj"] = mx.concatenate(halves, axis=-2).astype(mx.bfloat16)
        out[f"{prefix}.down_proj"] = stacks["down_proj"].astype(mx.bfloat16)
    return out
