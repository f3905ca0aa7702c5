"""Experts whose stored bytes are the held bytes, or the same numbers in a narrower float.

These are floats that nothing computes with and the words of folders in MLX form. Nothing but a
move is left: into the slot, gate and up apart, bfloat16 and float16 widened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from vllm_moe_compat.execute.build_tensor import take_unread
from vllm_moe_compat.execute.quantize import PackedBuild
from vllm_moe_compat.execute.stored_tensors import Bytes, StoredTensor, StoredTensors
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.plan.build import Restriction
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts

Reads: TypeAlias = list[tuple[StoredTensor, Bytes]]
Values: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True, slots=True)
class Plain:
    """One build that only moves bytes.

    Attributes:
        packed: the build.
        keys: of its targets among the specs.
        stored: the files.
        split: how gate and up are apart; None for one target.
        widened: dtype of the stored floats, if the slots are float32 and these are not.
    """

    packed: PackedBuild
    keys: tuple[str, ...]
    stored: StoredTensors
    split: SplitGateUp | None
    widened: mx.Dtype | None

    def prepare(
        self, expert: int, views: Mapping[str, Bytes]
    ) -> tuple[Reads, Callable[[], None] | None]:
        """Return what to read and where to, and what is left to do afterwards."""
        build = self.packed.build.restricted(Restriction(experts=(expert, expert + 1)))
        operand = take_unread(build, {name: self.stored[name] for name in build.sources})
        (tensor,) = operand.weights
        targets = [views[key] for key in self.keys]
        split = self.split
        if self.widened is None and (split is None or not split.interleaved):
            return list(zip(_halves(tensor, split), targets, strict=True)), None
        buffer = np.empty(tensor.nbytes, np.uint8)
        size, shape, kind = tensor.dtype.size, tensor.shape, self.widened

        def finish() -> None:
            values = buffer.view(f"u{size}").reshape(shape)
            for found, target in zip(_apart(values, split), targets, strict=True):
                if kind is None:
                    target.view(found.dtype).reshape(found.shape)[...] = found
                elif kind == mx.bfloat16:
                    wide = target.view(np.uint32).reshape(found.shape)
                    np.left_shift(found, np.uint32(16), out=wide, dtype=np.uint32)
                else:
                    target.view(np.float32).reshape(found.shape)[...] = found.view(np.float16)

        return [(tensor, buffer)], finish


def plain(
    packed: PackedBuild, keys: Sequence[str], stored: StoredTensors, specs: Mapping[str, Spec]
) -> Plain | None:
    """Return the build as moves of bytes; None if something has to be computed."""
    build = packed.build
    ops = [op for op in build.ops if not isinstance(op, StackExperts)]
    split = None
    if ops and isinstance(ops[-1], SplitGateUp):
        split, ops = ops[-1], ops[:-1]
    cut = build.restriction is not None and split is not None
    if ops or cut or any(packed.formats):
        return None
    (source,) = {stored[name].dtype for name in build.weights}
    (held,) = {specs[key].dtype for key in keys}
    widens = source in (mx.bfloat16, mx.float16) and held == mx.float32
    if source != held and not widens:
        return None
    return Plain(packed, tuple(keys), stored, split, source if widens else None)


def _halves(tensor: StoredTensor, split: SplitGateUp | None) -> list[StoredTensor]:
    if split is None:
        return [tensor]
    half = tensor.shape[split.axis] // 2
    if split.axis == -1:
        return [tensor[..., :half], tensor[..., half:]]
    return [tensor[..., :half, :], tensor[..., half:, :]]


def _apart(values: Values, split: SplitGateUp | None) -> list[Values]:
    if split is None:
        return [values]
    half = values.shape[split.axis] // 2
    pairs = [slice(0, None, 2), slice(1, None, 2)]
    if not split.interleaved:
        pairs = [slice(0, half), slice(half, None)]
    if split.axis == -1:
        return [values[..., pair] for pair in pairs]
    return [values[..., pair, :] for pair in pairs]
