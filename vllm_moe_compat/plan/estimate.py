"""What a load will take, worked out from the headers before a byte is read.

Final bytes are exact for what is not quantised, and for quantised tensors up to
the few modules that a class keeps in a format of its own (routers). The peak adds
the largest source that has to be read as one tensor, and the working buffers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vllm_moe_compat import dtypes
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS, Requantize
from vllm_moe_compat.plan.planner import Plan

NONE = "none"
WORKING_BYTES = 96 * 2**20
"""What the steps of one build hold, whatever its size: see ``execute.TEMPORARY_BYTES``."""

_WEIGHTS = (".weight", ".experts.gate_up_proj", ".experts.down_proj")


def nbytes(spec: Spec | TensorInfo) -> int:
    """Return the bytes of a tensor."""
    return dtypes.nbytes(spec.dtype, spec.shape)


def packed_bytes(spec: Spec, packing: Requantize, float_bytes: int = 2) -> int:
    """Return the bytes of a tensor in packed form, scales and biases included."""
    count = math.prod(spec.shape)
    per_group = 2 * float_bytes if packing.mode == "affine" else 1
    return count * packing.bits // 8 + count // packing.group * per_group


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes on disk, and per setting (``none``, ``8bit``, …) in memory.

    Attributes:
        read: what is read from the files.
        final: what the weights take.
        peak: what loading them takes.
    """

    read: int
    final: Mapping[str, int]
    peak: Mapping[str, int]

    def fitting(self, limit: int) -> list[str]:
        """Return the settings whose peak is within ``limit``, the largest first."""
        return [
            s for s in sorted(self.peak, key=self.peak.__getitem__)[::-1] if self.peak[s] <= limit
        ]


def estimate(
    plan: Plan,
    tensors: Mapping[str, TensorInfo],
    dtype: str,
    packed_dtype: str = "BF16",
    spare: Mapping[str, Collection[str]] | None = None,
) -> Estimate:
    """Estimate a load for every setting.

    Args:
        plan: for these tensors.
        tensors: what will be loaded; what the plan drops may be among them.
        dtype: safetensors' name of what dequantised tensors become.
        packed_dtype: the same for the scales of packed ones.
        spare: setting → names of tensors that it leaves as they are.
    """
    spare = spare or {}
    gone = set(plan.drops).union(*(build.sources for build in plan.builds))
    specs = [
        (name, build.weights[0], spec)
        for build in plan.builds
        for name, spec in zip(build.targets, build.results(tensors, dtype), strict=True)
    ]
    # One build's weights are alike, or there were no plan.
    largest = max((nbytes(tensors[b.weights[0]]) for b in plan.builds), default=0)
    left = [(n, n, Spec(i.dtype, i.shape)) for n, i in tensors.items() if n not in gone]

    final = {NONE: sum(nbytes(spec) for _, _, spec in (*specs, *left))}
    peak = {NONE: final[NONE] + largest + WORKING_BYTES}
    whole = max([largest, *(nbytes(spec) for n, _, spec in left if _packs(n, spec))])
    float_bytes = 4 if packed_dtype == "F32" else 2
    for setting, packing in QUANTIZE_SETTINGS.items():
        names = spare.get(setting, ())
        final[setting] = sum(
            packed_bytes(spec, packing, float_bytes)
            if _packs(name, spec) and packing.fits(spec.shape) and source not in names
            else nbytes(spec)
            for name, source, spec in (*specs, *left)
        )
        peak[setting] = final[setting] + whole + WORKING_BYTES
    dropped = sum(nbytes(tensors[name]) for name in plan.drops if name in tensors)
    alike = Counter([(info.dtype, info.shape) for info in tensors.values()])
    read = sum(nbytes(Spec(*form)) * count for form, count in alike.items()) - dropped
    for build in plan.builds:
        if build.restriction is not None:
            whole = sum(nbytes(tensors[name]) for name in build.sources)
            read -= whole - build.bytes_read(tensors)
    return Estimate(read, final, peak)


def _packs(name: str, spec: Spec) -> bool:
    return spec.dtype in dtypes.FLOATS and len(spec.shape) > 1 and name.endswith(_WEIGHTS)
