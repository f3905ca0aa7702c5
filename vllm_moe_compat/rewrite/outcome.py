"""Compute names, dtypes and shapes of a rewrite step's results before a tensor is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.operations import Op, Operand, Spec
from vllm_moe_compat.rewrite.steps import RewriteStep


def results(
    step: RewriteStep, tensors: Mapping[str, TensorInfo], dtype: str
) -> Iterator[tuple[str, Spec]]:
    """Yield name and spec of every tensor that a step writes.

    Args:
        step: a step of a ``RewritePlan``.
        tensors: descriptions of the sources, with the dtypes of their headers.
        dtype: dtype of dequantised weights (safetensors' name).
    """
    dtype = "F32" if step.quantizes else dtype
    made: dict[str, Operand] = {}
    for build in step.builds:
        parts: dict[str, tuple[Spec, ...]] = {}
        if step.stays_stored:
            specs = _moved(build.ops, _specs(build.weights, tensors))
            parts = {role: _moved(build.ops, _specs(ns, tensors)) for role, ns in build.parts}
        else:
            specs = build.results(tensors, dtype)
        for number, name in enumerate(build.targets):
            own = {role: each[number : number + 1] for role, each in parts.items()}
            made[name] = Operand((specs[number],), own)
    for write in step.writes:
        each = [made.get(n) or Operand(_specs((n,), tensors)) for n in write.sources]
        operand = Operand(
            tuple(spec for one in each for spec in one.weights),
            {role: tuple(s for one in each for s in one.parts[role]) for role in each[0].parts},
        )
        if step.stays_stored:
            moved = {role: _moved(write.ops, specs) for role, specs in operand.parts.items()}
            operand = Operand(_moved(write.ops, operand.weights), moved)
        else:
            for op in write.ops:
                operand = op.result(operand, dtype)
        yield from zip(write.weights, operand.weights, strict=True)
        for role, names in write.parts:
            yield from zip(names, operand.parts[role], strict=True)


def _specs(names: Sequence[str], tensors: Mapping[str, TensorInfo]) -> tuple[Spec, ...]:
    return tuple(Spec(tensors[name].dtype, tensors[name].shape) for name in names)


def _moved(ops: Sequence[Op], specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """Return the specs after operations that move values."""
    operand = Operand(specs)
    for op in ops:
        operand = op.result(operand, "")
    return operand.weights
