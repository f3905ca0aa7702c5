"""Estimate the memory of a load from the headers, before a tensor is read.

Final bytes are exact for tensors that are not quantised. For quantised tensors they neglect the
few modules (routers) for which a class has a format of its own. The peak adds the largest
source that is read as one tensor, and working buffers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from vllm_moe_compat import dtypes
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.operations import MlxFormat, Spec
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS, Requantize
from vllm_moe_compat.plan.planner import Plan

NONE = "none"
WORKING_BYTES = 96 * 2**20
"""Working buffers of one build, whatever its size; see ``execute.stack.TEMPORARY_BYTES``."""

_WEIGHTS = (".weight", ".experts.gate_up_proj", ".experts.down_proj")


def nbytes(spec: Spec | TensorInfo) -> int:
    """Return the bytes of a tensor."""
    return dtypes.nbytes(spec.dtype, spec.shape)


def packed_bytes(spec: Spec, packing: Requantize, float_bytes: int = 2) -> int:
    """Return the bytes of a tensor in packed form, scales and biases included."""
    count = math.prod(spec.shape)
    per_group = 2 * float_bytes if packing.mode == "affine" else 1
    return count * packing.bits // 8 + count // packing.group * per_group


def held_bytes(spec: Spec, held: MlxFormat) -> int:
    """Return the bytes of a weight that MLX holds as it is stored, for its float spec."""
    return sum(map(nbytes, held.tensors(spec.shape).values()))


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes read from disk, and bytes in memory per quantisation setting (``none``, ``8bit``, …).

    Attributes:
        read: bytes read from the files.
        final: setting → bytes of the weights after the load.
        peak: setting → largest number of bytes during the load.
    """

    read: int
    final: Mapping[str, int]
    peak: Mapping[str, int]

    def fitting(self, limit: int) -> list[str]:
        """Return the settings whose peak is within ``limit`` bytes, the largest peak first."""
        return [
            s for s in sorted(self.peak, key=self.peak.__getitem__)[::-1] if self.peak[s] <= limit
        ]


def estimate(
    plan: Plan,
    tensors: Mapping[str, TensorInfo],
    dtype: str,
    packed_dtype: str = "BF16",
    spare: Mapping[str, Collection[str]] | None = None,
    ranks_of: Callable[[str], int] = lambda name: 1,
) -> Estimate:
    """Estimate a load for every quantisation setting.

    Args:
        plan: a plan for these tensors.
        tensors: the tensors to load, with or without those that the plan drops.
        dtype: dtype of dequantised weights (safetensors' name).
        packed_dtype: dtype of the scales of quantised weights (safetensors' name).
        spare: setting → names of tensors that it does not quantise.
        ranks_of: name of a tensor → number of ranks that divide it; see ``ranks.expected``.
    """
    spare = spare or {}
    gone = set(plan.drops).union(*(build.sources for build in plan.builds))
    specs = [
        (name, build.weights[0], spec)
        for build in plan.builds
        for name, spec in zip(build.targets, build.results(tensors, dtype), strict=True)
    ]
    # The checks have ensured that all weights of a build are equal in dtype and shape.
    largest = max(
        (nbytes(tensors[b.weights[0]]) // ranks_of(b.target) for b in plan.builds), default=0
    )
    left = [
        (n, n, Spec("BF16" if n in plan.made_upstream else i.dtype, i.shape))
        for n, i in tensors.items()
        if n not in gone
    ]

    held = {name: build.held for build in plan.builds if build.held for name in build.targets}
    final = {
        NONE: sum(
            (held_bytes(spec, held[name]) if name in held else nbytes(spec)) // ranks_of(name)
            for name, _, spec in (*specs, *left)
        )
    }
    peak = {NONE: final[NONE] + largest + WORKING_BYTES}
    others = (nbytes(spec) // ranks_of(n) for n, _, spec in left if _packs(n, spec))
    whole = max([largest, *others])
    float_bytes = 4 if packed_dtype == "F32" else 2
    for setting, packing in QUANTIZE_SETTINGS.items():
        names = spare.get(setting, ())
        final[setting] = sum(
            (
                packed_bytes(spec, packing, float_bytes)
                if _packs(name, spec) and packing.fits(spec.shape) and source not in names
                else nbytes(spec)
            )
            // ranks_of(name)
            for name, source, spec in (*specs, *left)
        )
        peak[setting] = final[setting] + whole + WORKING_BYTES
    dropped = sum(nbytes(tensors[name]) for name in plan.drops if name in tensors)
    specs_count = Counter([(info.dtype, info.shape) for info in tensors.values()])
    read = sum(nbytes(Spec(*spec)) * count for spec, count in specs_count.items()) - dropped
    for build in plan.builds:
        if build.restriction is not None:
            whole = sum(nbytes(tensors[name]) for name in build.sources)
            read -= whole - build.bytes_read(tensors)
    return Estimate(read, final, peak)


def _packs(name: str, spec: Spec) -> bool:
    return spec.dtype in dtypes.FLOATS and len(spec.shape) > 1 and name.endswith(_WEIGHTS)
