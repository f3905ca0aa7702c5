"""Experts whose stored bytes are the held bytes, or the same numbers in a narrower float.

These are floats that nothing computes with and the words of folders in MLX form. Nothing but a
move is left: into the slot, gate and up apart, bfloat16 and float16 widened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_moe_compat.execute.build_tensor import take_unread
from vllm_moe_compat.execute.quantize import PackedBuild
from vllm_moe_compat.execute.stored_tensors import Bytes, StoredTensor, StoredTensors
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.expert_cache.read_tasks import Task, bands
from vllm_moe_compat.plan.build import Restriction
from vllm_moe_compat.plan.ops import AsWords, SplitGateUp, StackExperts


@dataclass(frozen=True, slots=True)
class PlainBytes:
    """One build that only moves bytes.

    Attributes:
        packed: the build.
        keys: of its targets among the specs.
        stored: the files.
        split: how gate and up are apart; None for one target.
        widened: dtype of the stored floats, if the slots are float32 and these are not.
        grouped: whether the last two axes are one in memory.
    """

    packed: PackedBuild
    keys: tuple[str, ...]
    stored: StoredTensors
    split: SplitGateUp | None
    widened: mx.Dtype | None
    grouped: bool = False

    def tasks(self, expert: int, views: Mapping[str, Bytes]) -> list[Task]:
        """Return what to do for one expert."""
        tensor = self._source(expert)
        if self.grouped:
            tensor = tensor.with_merged_ends()
        targets = [views[key] for key in self.keys]
        if self.split is not None and self.split.interleaved:
            return [Task([tensor], _moving(tensor, targets, self.widened, self.split.axis))]
        each = zip(halves(tensor, self.split), targets, strict=True)
        if self.widened is None:
            return [Task([part], reading(part, target)) for part, target in each]
        return [Task([part], _moving(part, [target], self.widened)) for part, target in each]

    def _source(self, expert: int) -> StoredTensor:
        """Return what is stored of one expert."""
        build = self.packed.build
        if build.restriction is None:  # The usual case, without the detour: misses are many.
            if any(isinstance(op, StackExperts) for op in build.ops):
                return self.stored[build.weights[expert]]
            return self.stored[build.weights[0]][expert : expert + 1]
        build = build.restricted(Restriction(experts=(expert, expert + 1)))
        operand = take_unread(build, {name: self.stored[name] for name in build.sources})
        tensor: StoredTensor = operand.weights[0]
        return tensor


def reading(tensor: StoredTensor, target: Bytes) -> Callable[[], None]:
    """Return what reads a tensor into its place."""
    return lambda: tensor.read_into(target)


def _moving(
    tensor: StoredTensor, targets: Sequence[Bytes], widened: mx.Dtype | None, axis: int = -2
) -> Callable[[], None]:
    """Return what reads a tensor and writes every second row or column into each target."""
    size, apart = tensor.dtype.size, len(targets)

    def move() -> None:
        for first, found in bands(tensor):
            values = found.view(f"u{size}").reshape(-1, tensor.shape[-1])
            for number, target in enumerate(targets):
                mine = values[number::apart] if axis == -2 else values[:, number::apart]
                wide = target.view(f"u{size if widened is None else 4}")
                begin = first // apart * mine.shape[1] if axis == -2 else 0
                into = wide[begin : begin + mine.size].reshape(mine.shape)
                if widened is None:
                    into[...] = mine
                elif widened == mx.bfloat16:
                    np.left_shift(mine, np.uint32(16), out=into, dtype=np.uint32)
                else:
                    into.view(np.float32)[...] = mine.view(np.float16)

    return move


def plain_bytes(
    packed: PackedBuild, keys: Sequence[str], stored: StoredTensors, specs: Mapping[str, Spec]
) -> PlainBytes | None:
    """Return the build as moves of bytes; None if something has to be computed."""
    build = packed.build
    ops = [op for op in build.ops if not isinstance(op, StackExperts)]
    split = None
    if ops and isinstance(ops[-1], SplitGateUp):
        split, ops = ops[-1], ops[:-1]
    words = None
    if ops and isinstance(ops[-1], AsWords):
        words, ops = ops[-1], ops[:-1]
    cut = build.restriction is not None and (split is not None or words is not None)
    if ops or cut or any(packed.formats):
        return None
    (source,) = {stored[name].dtype for name in build.weights}
    (held,) = {specs[key].dtype for key in keys}
    if words is not None:
        return PlainBytes(packed, tuple(keys), stored, split, None, words.grouped)
    if not all(specs[key].is_rounded(source) for key in keys):
        return None
    widens = source in (mx.bfloat16, mx.float16) and held == mx.float32
    if source != held and not widens:
        return None
    return PlainBytes(packed, tuple(keys), stored, split, source if widens else None)


def halves(tensor: StoredTensor, split: SplitGateUp | None) -> list[StoredTensor]:
    """Return gate and up, one after the other in a tensor; or the tensor, if nothing is split."""
    if split is None:
        return [tensor]
    half = tensor.shape[split.axis] // 2
    if split.axis == -1:
        return [tensor[..., :half], tensor[..., half:]]
    return [tensor[..., :half, :], tensor[..., half:, :]]
