"""A stand-in for the wrapper that vllm-metal puts round two Qwen3.5 classes.

It behaves as that one does: eager (it imports the models to wrap them), lazy in
MLX's sense (nothing is evaluated), blocks of 128 built in, bfloat16 results, and
per-expert tensors stacked into the combined form that upstream splits again. A
mark on its function keeps it from wrapping twice. It never takes itself out;
``remove`` does that for the tests.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx

MODULES = ("mlx_lm.models.qwen3_5", "mlx_lm.models.qwen3_5_moe")
MARK = "_stand_in_shim"
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def install() -> Callable[[], None]:
    """Wrap both classes; return what puts back what was there."""
    undo = []
    for name in MODULES:
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
    if not any("weight_scale_inv" in name for name in weights):
        return weights
    out = {}
    for name, value in weights.items():
        if name.endswith("_scale_inv"):
            continue
        scale = weights.get(f"{name}_scale_inv")
        if scale is not None:
            rows, columns = value.shape
            value = mx.pad(mx.from_fp8(value), [(0, -rows % 128), (0, -columns % 128)])
            tiles = value.reshape(scale.shape[0], 128, scale.shape[1], 128)
            value = (tiles * scale[:, None, :, None]).reshape(value.shape)
            value = value[:rows, :columns].astype(mx.bfloat16)
        out[name] = value
    return out


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
        stacks = {k: mx.stack([v[e] for e in range(len(v))]) for k, v in kinds.items()}
        out[f"{prefix}.gate_up_proj"] = mx.concatenate([stacks["gate"], stacks["up"]], axis=-2)
        out[f"{prefix}.down_proj"] = stacks["down"]
    return out
