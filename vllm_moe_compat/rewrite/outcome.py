"""What the steps of a rewriting give, before anything is read: names, dtypes, shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.plan.ops import Op
from vllm_moe_compat.plan.planner import Build
from vllm_moe_compat.plan.specs import Operand, Spec
from vllm_moe_compat.rewrite.planner import Step, quantises


def results(
    step: Step, tensors: Mapping[str, TensorInfo], dtype: str
) -> Iterator[tuple[str, Spec]]:
    """Yield what a step gives, name by name, by the operations' own algebra.

    Args:
        step: of a ``Rewriting``.
        tensors: the sources' descriptions, FP8 by its name.
        dtype: safetensors' name of what dequantising gives.
    """
    dtype = "F32" if quantises(step) else dtype
    made: dict[str, Operand] = {}
    for build in step.there:
        specs = build.results(tensors, dtype) if not step.moved else _results(build, tensors)
        scales = _results(build, tensors, build.scales) if step.moved else ()
        for number, name in enumerate(build.targets):
            made[name] = Operand((specs[number],), scales[number : number + 1])
    for write in step.back:
        parts = [made.get(n) or Operand((_spec(tensors[n]),)) for n in write.sources]
        weights = tuple(spec for part in parts for spec in part.weights)
        scales = tuple(spec for part in parts for spec in part.scales)
        if step.moved:
            found = _through(write.ops, weights), _through(write.ops, scales)
        else:
            operand = Operand(weights, scales)
            for op in write.ops:
                operand = op.result(operand, dtype)
            found = operand.weights, operand.scales
        yield from zip(write.weights, found[0], strict=True)
        yield from zip(write.scales, found[1], strict=True)


def _spec(info: TensorInfo) -> Spec:
    return Spec(info.dtype, info.shape)


def _results(
    build: Build, tensors: Mapping[str, TensorInfo], names: Sequence[str] = ()
) -> tuple[Spec, ...]:
    return _through(build.ops, tuple(_spec(tensors[n]) for n in names or build.weights))


def _through(ops: Sequence[Op], specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """Return what operations that only move values give."""
    operand = Operand(specs)
    for op in ops:
        operand = op.result(operand, "")
    return operand.weights
