"""Which tensors are FP8, and where their scales are.

Block FP8 as DeepSeek and Qwen publish it: an E4M3 weight and, under the same
name with ``_scale_inv`` appended, a grid of factors to *multiply* by, one per
block of ``weight_block_size`` rows and columns. The rule is the same for 2-D
weights, 3-D combined experts and stacked ones; only the last two axes count.

Nothing is refused here: what does not fit is listed, and the planner says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vllm_moe_compat.layout.experts import SCALE_SUFFIX, STATIC_SCALES
from vllm_moe_compat.layout.headers import TensorInfo

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_NOT_WEIGHTS = ("_scale", "_scale_inv", "_scale_2", "_global_scale", ".scales")
_OTHER_SCALES = ("_scale", "_scale_2", "_global_scale")


@dataclass(slots=True)
class Fp8Tensors:
    """The FP8 tensors of a checkpoint, by how they can be read.

    Attributes:
        pairs: weight → its ``_scale_inv``.
        bare: FP8 weights with no scale of any kind.
        orphans: ``_scale_inv`` tensors whose weight is missing.
        plain: ``_scale_inv`` tensors whose weight is not FP8.
        other: FP8 weights with a scale of another convention → that scale.
        static: scales of activations, which MLX has no use for.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    other: dict[str, str] = field(default_factory=dict)
    static: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.pairs or self.bare or self.orphans or self.plain or self.other)


def find_fp8(tensors: Mapping[str, TensorInfo]) -> Fp8Tensors:
    """Pair every FP8 weight with its scale."""
    found = Fp8Tensors()
    for name, info in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            weight = tensors.get(name.removesuffix(SCALE_SUFFIX))
            if weight is None:
                found.orphans.append(name)
            elif weight.dtype not in FP8_DTYPES:
                found.plain.append(name)
        elif info.dtype in FP8_DTYPES and not name.endswith(_NOT_WEIGHTS):
            if name + SCALE_SUFFIX in tensors:
                found.pairs[name] = name + SCALE_SUFFIX
            elif scale := next((name + s for s in _OTHER_SCALES if name + s in tensors), None):
                found.other[name] = scale
            else:
                found.bare.append(name)
        elif name.endswith(STATIC_SCALES):
            weight = tensors.get(_scaled_weight(name))
            if weight is not None and weight.dtype in FP8_DTYPES:
                found.static.append(name)
    return found


def _scaled_weight(name: str) -> str:
    """Return the weight whose input ``q_proj.activation_scale`` describes.

    For a combined tensor the name is ``gate_up_proj_activation_scale``.
    """
    suffix = next(s for s in STATIC_SCALES if name.endswith(s))
    module = name.removesuffix(suffix)
    return f"{module}weight" if module.endswith(".") else module.removesuffix("_")


def infer_fp8(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Name as E4M3 what must be: MLX's loader calls FP8 bytes ``uint8`` (``U8``).

    A ``uint8`` weight is FP8 when its ``_scale_inv`` is there, and also when no
    scale of any kind is: packed 4-bit formats always have one.
    """
    return {
        name: replace(info, dtype="F8_E4M3")
        if info.dtype == "U8" and _is_fp8_weight(name, tensors)
        else info
        for name, info in tensors.items()
    }


def _is_fp8_weight(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    if name + SCALE_SUFFIX in tensors:
        return True
    if name.endswith(".weight"):
        packed = (name + "_scale", name.removesuffix("weight") + "scales")
    elif name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        packed = (name + "_scale", name + "_scales")
    else:
        return False
    return not any(scale in tensors for scale in packed)
