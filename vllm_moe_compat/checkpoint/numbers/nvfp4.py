"""NVFP4: E2M1 pairs, one E4M3 scale for each group of 16 columns, one float for the matrix.

A value is ``E2M1 · scale · global scale``. compressed-tensors writes ``weight_packed``,
``weight_scale`` and ``weight_global_scale``, which *divides*; ModelOpt writes ``weight``,
``weight_scale`` and ``weight_scale_2``, which multiplies. A weight without its global scale
would be off by a factor of thousands, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers import mxfp4
from vllm_moe_compat.checkpoint.numbers.fp4 import (
    DIVISOR,
    FACTOR,
    PACKED,
    Fp4,
    Fp4Tensors,
    scale_names,
)
from vllm_moe_compat.checkpoint.numbers.fp4_ops import GLOBAL, NVFP4


class NvFp4(Fp4):
    """E2M1 pairs with E4M3 scales and a global scale."""

    name = NVFP4
    title = "NVFP4"
    faults: Mapping[str, str] = MappingProxyType(
        {
            "scales": "an NVFP4 weight without a scale, or a scale that does not fit",
            "unsupported": "packed FP4 with scales that MLX cannot decode",
        }
    )
    methods = frozenset({"compressed-tensors", "modelopt", "modelopt_fp4", "modelopt_mixed"})
    scales = frozenset({"F8_E4M3"})

    def find(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Fp4Tensors:
        """Pair every tensor of bytes with its scales; packed bytes without any are faults."""
        found = super().find(tensors, config)
        used = set()
        for name, (_, parts) in found.weights.items():
            roles = dict(parts)
            if GLOBAL in roles:
                used.add(roles[GLOBAL])
            else:
                found.lone.append(name)
        for name, info in tensors.items():
            if name.endswith((DIVISOR, FACTOR)):
                if name not in used and self._is_alone(name, tensors):
                    found.orphans.append(name)
            elif name.endswith(PACKED) and info.dtype == "U8":
                weight = name.removesuffix(PACKED)
                scale = next((s for s in scale_names(name) if s in tensors), "")
                if not scale:
                    found.bare.append(weight)
                elif tensors[scale].dtype not in self.scales | mxfp4.FORM.scales:
                    found.odd[weight] = scale
        return found

    def shared_of(self, weight: str, tensors: Mapping[str, TensorInfo]) -> str:
        """Return the name of a weight's global scale."""
        stems = (weight,) if weight.endswith(".weight") else (weight, f"{weight}_weight")
        names = (f"{stem}{ending}" for stem in stems for ending in (DIVISOR, FACTOR))
        return next((name for name in names if name in tensors), "")

    def _is_alone(self, shared: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether a global scale has no weight beside it."""
        weight = shared.removesuffix(DIVISOR).removesuffix(FACTOR)
        stems = (weight, weight.removesuffix("_weight"))
        return not any(n in tensors for stem in stems for n in (stem, f"{stem}{PACKED}"))

    def infer(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Give scales beside a global scale, which MLX's loader reports as ``U8``, their dtype."""
        inferred = dict(tensors)
        for name in tensors:
            if name.endswith((DIVISOR, FACTOR)):
                stem = name.removesuffix(DIVISOR).removesuffix(FACTOR)
                scale = inferred.get(f"{stem}_scale")
                if scale is not None and scale.dtype == "U8":
                    inferred[f"{stem}_scale"] = replace(scale, dtype="F8_E4M3")
        return inferred


FORM = NvFp4()
