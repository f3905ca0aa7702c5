"""Experts in a packed form whose bytes are those of MLX's format: FP4 with its scales.

Words and scales are read straight into the slot. Only a matrix's one global scale is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_moe_compat.checkpoint.operations import Dequantize, MlxFormat
from vllm_moe_compat.execute.build_tensor import take_unread
from vllm_moe_compat.execute.numbers import executor_of
from vllm_moe_compat.execute.quantize import PackedBuild
from vllm_moe_compat.execute.stored_tensors import Bytes, StoredTensor, StoredTensors
from vllm_moe_compat.expert_cache.plain_bytes import halves, reading
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.expert_cache.read_tasks import Task
from vllm_moe_compat.plan.build import Restriction
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

    def tasks(self, expert: int, views: Mapping[str, Bytes]) -> list[Task]:
        """Return what to do for one expert."""
        build = self.packed.build.restricted(Restriction(experts=(expert, expert + 1)))
        operand = take_unread(build, {name: self.stored[name] for name in build.sources})
        weight, scales, shared = executor_of(self.op).held_parts(operand)
        tasks = []
        for kind, tensor in (("weight", weight), ("scales", scales)):
            for module, part in zip(self.modules, halves(tensor, self.split), strict=True):
                tasks.append(Task([part], reading(part, views[f"{module}.{kind}"])))
        if shared is not None:
            targets = [views[f"{module}.global_scale"] for module in self.modules]
            tasks.append(Task([shared], self._scaling(shared, targets)))
        return tasks

    def _scaling(self, shared: StoredTensor, targets: Sequence[Bytes]) -> Callable[[], None]:
        def scale() -> None:
            buffer = np.empty(shared.nbytes, np.uint8)
            shared.read_into(buffer)
            found = executor_of(self.op).held_scale(self.op, buffer, shared.kind)
            for number, target in enumerate(targets):
                # Gate and up of combined experts may have one each.
                target.view(np.float32)[:] = found[min(number, len(found) - 1)]

        return scale


def held_bytes(
    packed: PackedBuild, keys: Sequence[str], stored: StoredTensors, specs: Mapping[str, Spec]
) -> HeldBytes | None:
    """Return the build if its bytes are held as they are; None if they have to be changed."""
    build, op = packed.build, packed.build.dequantize
    if op is None or build.restriction is not None or not executor_of(op).holds_bytes(op):
        return None
    if not all(isinstance(packing, MlxFormat) for packing in packed.formats):
        return None
    others = [o for o in build.ops if not isinstance(o, StackExperts) and o is not op]
    split = next((o for o in others if isinstance(o, SplitGateUp)), None)
    if len(others) > (split is not None) or (split is not None and split.interleaved):
        return None
    modules = tuple(key.removesuffix(".weight") for key in keys)
    held = {(specs[f"{m}.weight"].dtype, specs[f"{m}.scales"].dtype) for m in modules}
    if held != {(mx.uint32, mx.uint8)}:
        return None
    return HeldBytes(packed, op, modules, stored, split)
