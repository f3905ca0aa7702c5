"""The routed experts of a planned load: their layers, bytes, and what a cache of them saves.

Sizes are those of the running server: on MLX's CPU device, which multiplies gathered experts in
float32 only, float experts count in that. A load may still settle on a few bytes more or less,
where a module has a format of its own; then its own count decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.dtypes import FLOATS, STORED_NAMES
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.estimate import Estimate, held_bytes, nbytes, packed_bytes
from vllm_moe_compat.plan.expert_cache import CachePlan, CacheSetting, ExpertLayer, least_bytes
from vllm_moe_compat.plan.experts_per_token import experts_per_token
from vllm_moe_compat.plan.kept import together
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.plan.planned_load import PlannedLoad


@dataclass(frozen=True, slots=True)
class PlannedExperts:
    """The routed experts of a load.

    Attributes:
        layers: the layers with experts; empty for a dense model.
        per_token: experts that one token needs in a layer.
        estimated: bytes of all experts as ``estimate`` counts them.
    """

    layers: tuple[ExpertLayer, ...]
    per_token: int
    estimated: int

    def cached(self, needs: Estimate, setting: str, cache: CachePlan) -> Estimate:
        """Return the estimate of a load that keeps only the cache's part of experts.

        The peak still has the working buffers and the largest source, a part of a layer.
        """
        less = self.estimated - cache.nbytes
        return replace(
            needs,
            final={**needs.final, setting: needs.final[setting] - less},
            peak={**needs.peak, setting: needs.peak[setting] - less},
        )

    def largest_cache(self, needs: Estimate, setting: str, limit: int) -> CacheSetting | None:
        """Return the largest cache with which a load stays within ``limit`` bytes, if any does."""
        if not self.layers:
            return None
        room = (limit - (needs.peak[setting] - self.estimated)) >> 20
        if room << 20 < least_bytes(self.layers, self.per_token):
            return None
        return CacheSetting(f"{room}MiB", nbytes=room << 20)


def planned_experts(planned: PlannedLoad, setting: str, device: str) -> PlannedExperts:
    """Return the routed experts of a planned load, in the order of the layers.

    Of several ranks, it is the share of one: a part of every layer, or as much in whole layers.

    Args:
        planned: a load without faults.
        setting: a quantisation setting that applies to the checkpoint.
        device: ``cpu``, or any other name.

    Raises:
        UnsupportedCheckpointError: the experts cannot be read one by one.
    """
    plan = planned.plan_for(setting, complete=True)
    layout, row = planned.layout, planned.row
    if layout is None or not layout.experts:
        return PlannedExperts((), 0, 0)
    if plan is None or row is None or row.moe is None:
        raise UnsupportedCheckpointError(
            f"the registry has no row for the experts of {planned.module}, so that they cannot be "
            "read one by one"
        )
    if alone := together(plan.builds, layout):
        raise UnsupportedCheckpointError(
            f"{row.module} makes its experts from {alone} all together, so that they cannot be "
            "read one by one"
        )
    per_token = experts_per_token(planned.config, planned.module)
    tensors, target = layout.tensors, f".{row.moe.target}."
    # Of the few stacked experts that only the module's sanitize moves to the target.
    stacked = {name: block.path for block in layout.experts for name in block.stacked.values()}
    size = _Size(planned, setting, device)
    layers: dict[str, ExpertLayer] = {}
    estimated = 0
    for build in plan.builds:
        before, found, _ = f".{build.target}".partition(target)
        path = f"{before}{target[:-1]}"[1:] if found else stacked.get(build.weights[0])
        if path is None:
            continue
        specs = build.results(tensors, size.dtype)
        layer = layers.get(path) or ExpertLayer(path, specs[0].shape[0], 0)
        if any(spec.shape[:1] != (layer.experts,) for spec in specs):
            continue  # Of all experts together, as a router's correction.
        for name, spec in zip(build.targets, specs, strict=True):
            counted, held = size.of(build, name, spec)
            estimated += counted
            layer = replace(layer, nbytes=layer.nbytes + held)
        read = sum(nbytes(tensors[name]) for name in build.sources)
        layers[path] = replace(layer, stored=layer.stored + read)
    ranks = planned.serving.ranks
    each = (replace(x, nbytes=x.nbytes // ranks, stored=x.stored // ranks) for x in layers.values())
    return PlannedExperts(tuple(each), per_token, estimated // ranks)


class _Size:
    """The bytes of a target, as ``estimate`` counts them and in the form that is computed."""

    def __init__(self, planned: PlannedLoad, setting: str, device: str) -> None:
        serving = planned.serving
        self.dtype = STORED_NAMES[serving.dtype]
        self._packing = QUANTIZE_SETTINGS.get(setting)
        self._spare: Collection[str] = planned.spared(setting) if self._packing else ()
        self._packed_dtype = STORED_NAMES[serving.packed_dtype]
        self._scale_bytes = 4 if self._packed_dtype == "F32" else 2
        self._kept = STORED_NAMES[serving.kept_dtype] if serving.kept_dtype else None
        self._is_cpu = device == "cpu"

    def of(self, build: Build, name: str, spec: Spec) -> tuple[int, int]:
        packing = self._packing
        is_weight = name.endswith(".weight") and spec.dtype in FLOATS
        if build.held is not None:
            parts = build.held.tensors(spec.shape)
            return held_bytes(spec, build.held), self._served(parts)
        spared = build.weights[0] in self._spare
        if packing and is_weight and packing.fits(spec.shape) and not spared:
            counted = packed_bytes(spec, packing, self._scale_bytes)
            values = spec if build.dequantize is None else Spec(self._packed_dtype, spec.shape)
            return counted, self._served(packing.tensors(values))
        if self._is_cpu and is_weight:
            return nbytes(spec), nbytes(Spec("F32", spec.shape))
        return nbytes(spec), self._served({name.rpartition(".")[2]: spec})

    def _served(self, parts: Mapping[str, Spec]) -> int:
        """Return the bytes of a module's tensors after they were cast to the serving dtype."""
        total = 0
        for role, part in parts.items():
            dtype = part.dtype
            if self._kept and dtype in FLOATS and role != "global_scale":
                # Scales that the serving dtype cannot represent stay exact, in float32.
                is_exact = dtype == self._kept or role not in ("scales", "biases")
                dtype = self._kept if is_exact else "F32"
            total += nbytes(Spec(dtype, part.shape))
        return total
