"""Experts in a packed form whose words are those of MLX's format: FP4, and integers without zeros.

Words and scales are read straight into the slot. Only global scales and biases are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_moe_compat.checkpoint.operations import Dequantize, MlxFormat
from vllm_moe_compat.dtypes import mlx_dtype
from vllm_moe_compat.execute.build_tensor import take_unread
from vllm_moe_compat.execute.numbers import executor_of
from vllm_moe_compat.execute.numbers.executor import HeldPart
from vllm_moe_compat.execute.quantize import PackedBuild
from vllm_moe_compat.execute.stored_tensors import Bytes, StoredTensor, StoredTensors
from vllm_moe_compat.expert_cache.plain_bytes import halves, reading
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.expert_cache.read_tasks import Task
from vllm_moe_compat.plan.build import Build, Restriction
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """One build that is held as it is stored.

    Attributes:
        packed: the build.
        op: the operation that would dequantise it.
        modules: ``gate_proj`` of each target.
        stored: the files.
        split: how gate and up are apart; None for one target.
    """

    packed: PackedBuild
    op: Dequantize
    modules: tuple[str, ...]
    stored: StoredTensors
    split: SplitGateUp | None

    def parts(self, expert: int) -> list[HeldPart]:
        """Return the stored tensors of one expert, unread."""
        build = self.packed.build.restricted(Restriction(experts=(expert, expert + 1)))
        operand = take_unread(build, {name: self.stored[name] for name in build.sources})
        return executor_of(self.op).held_parts(self.op, operand)

    def tasks(self, expert: int, views: Mapping[str, Bytes]) -> list[Task]:
        """Return what to do for one expert."""
        tasks = []
        for kind, tensor, convert in self.parts(expert):
            targets = [views[f"{module}.{kind}"] for module in self.modules if kind]
            if convert is None:
                for part, target in zip(halves(tensor, self.split), targets, strict=True):
                    tasks.append(Task([part], reading(part, target)))
            else:
                tasks.append(Task([tensor], _converting(tensor, convert, targets)))
        return tasks


def _converting(
    tensor: StoredTensor, convert: Callable[[Any], Any], targets: Sequence[Bytes]
) -> Callable[[], None]:
    def run() -> None:
        buffer = np.empty(tensor.nbytes, np.uint8)
        tensor.read_into(buffer)
        found = convert(buffer)
        for number, target in enumerate(targets):
            # One value may be that of gate and up.
            size = len(found) if len(found) < len(targets) else len(found) // len(targets)
            first = 0 if len(found) < len(targets) else number * size
            target.view(found.dtype)[:] = found[first : first + size]

    return run


def _holds(build: Build, op: Dequantize) -> bool:
    return executor_of(op).holds_bytes(op, [role for role, _ in build.parts])


def held_bytes(
    packed: PackedBuild, keys: Sequence[str], stored: StoredTensors, specs: Mapping[str, Spec]
) -> HeldBytes | None:
    """Return the build if its bytes are held as they are; None if they have to be changed."""
    build, op = packed.build, packed.build.dequantize
    if op is None or build.restriction is not None or not _holds(build, op):
        return None
    if not all(isinstance(packing, MlxFormat) for packing in packed.formats):
        return None
    others = [o for o in build.ops if not isinstance(o, StackExperts) and o is not op]
    split = next((o for o in others if isinstance(o, SplitGateUp)), None)
    if len(others) > (split is not None) or (split is not None and split.interleaved):
        return None
    modules = tuple(key.removesuffix(".weight") for key in keys)
    for packing in packed.formats:
        assert isinstance(packing, MlxFormat)
        kinds = {f"{m}.scales": mlx_dtype(packing.scales) for m in modules}
        if any(specs[name].dtype != dtype for name, dtype in kinds.items()):
            return None  # The layer's class has them in another dtype.
    found = HeldBytes(packed, op, modules, stored, split)
    return found if all(_fits(part, modules, specs) for part in found.parts(0)) else None


def _fits(part: HeldPart, modules: Sequence[str], specs: Mapping[str, Spec]) -> bool:
    """Whether the stored bytes are those of the parameters; else they are broadcast first."""
    if part.convert is not None:
        return True
    each = [specs[f"{module}.{part.kind}"] for module in modules]
    return part.tensor.nbytes == sum(math.prod(s.shape) * s.dtype.size for s in each)
