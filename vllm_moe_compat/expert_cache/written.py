"""Experts whose number form is dequantised straight into the slot.

The plan's operations make a tensor first, by MLX, which is then copied into the slot. Where the
form's executor can write into memory that it is given, both are saved, and so is the time until
MLX's own thread answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_moe_compat.checkpoint.operations import Dequantize
from vllm_moe_compat.execute.build_tensor import take_unread
from vllm_moe_compat.execute.numbers import executor_of
from vllm_moe_compat.execute.quantize import PackedBuild
from vllm_moe_compat.execute.stored_tensors import Bytes, StoredTensor, StoredTensors
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.expert_cache.read_tasks import Task, bands
from vllm_moe_compat.plan.build import Restriction
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts


@dataclass(frozen=True, slots=True)
class Written:
    """One build that an executor writes.

    Attributes:
        packed: the build.
        op: its dequantising operation.
        keys: of its targets among the specs.
        specs: ``gate_proj.weight`` → spec.
        stored: the files.
    """

    packed: PackedBuild
    op: Dequantize
    keys: tuple[str, ...]
    specs: Mapping[str, Spec]
    stored: StoredTensors

    def tasks(self, expert: int, views: Mapping[str, Bytes]) -> list[Task]:
        """Return what to do for one expert."""
        build = self.packed.build.restricted(Restriction(experts=(expert, expert + 1)))
        operand = take_unread(build, {name: self.stored[name] for name in build.sources})
        (tensor,) = operand.weights
        parts: dict[str, StoredTensor] = {role: one for role, (one,) in operand.parts.items()}
        targets = [
            views[key].view(f"u{spec.dtype.size}").reshape(spec.shape)
            for key, spec in ((key, self.specs[key]) for key in self.keys)
        ]

        *_, rows, columns = tensor.shape

        def write() -> None:
            found = {role: (_read(part), part.kind) for role, part in parts.items()}
            executor = executor_of(self.op)
            writer = executor.writer(self.op, (rows, columns), found, self.packed.dtype)
            for first, memory in bands(tensor):
                band = memory.reshape(-1, columns)
                for number, target in enumerate(targets):
                    begin = number * len(target)
                    low = max(first, begin)
                    high = min(first + len(band), begin + len(target))
                    if low < high:
                        writer(
                            low,
                            band[low - first : high - first],
                            target[low - begin : high - begin],
                        )

        return [Task([tensor, *parts.values()], write)]


def _read(tensor: StoredTensor) -> Bytes:
    buffer = np.empty(tensor.nbytes, np.uint8)
    tensor.read_into(buffer)
    return buffer


def written(
    packed: PackedBuild, keys: Sequence[str], stored: StoredTensors, specs: Mapping[str, Spec]
) -> Written | None:
    """Return the build if an executor writes it; None if its operations have to be run."""
    build, op = packed.build, packed.build.dequantize
    if op is None or any(packed.formats) or build.restriction is not None:
        return None
    others = [o for o in build.ops if not isinstance(o, StackExperts) and o is not op]
    if not all(isinstance(o, SplitGateUp) and not o.interleaved for o in others):
        return None
    *_, rows, columns = op.logical(stored.infos[build.weights[0]].shape)
    (held,) = {specs[key].dtype for key in keys}
    narrow = getattr(mx, packed.dtype) if packed.dtype else None
    if not all(specs[key].is_rounded(narrow) for key in keys):
        return None
    if not executor_of(op).writes(op, rows, columns, packed.dtype, held):
        return None
    return Written(packed, op, tuple(keys), specs, stored)
