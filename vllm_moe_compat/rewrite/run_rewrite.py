"""Run a rewrite plan on MLX arrays.

Tensors are removed from the caller's dict as they are read and yielded as they are made, so
memory holds one step at a time: a layer's gate and up, its down, or a single expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.numbers import infer_dtypes
from vllm_moe_compat.checkpoint.operations import Op
from vllm_moe_compat.execute.arrays import run
from vllm_moe_compat.execute.build_tensor import make_build, take
from vllm_moe_compat.execute.run_plan import failure, tensor_infos
from vllm_moe_compat.execute.stack import Arrays, Stack
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.rewrite.planner import plan_rewrite
from vllm_moe_compat.rewrite.steps import RewritePlan, RewriteStep
from vllm_moe_compat.rewrite.written_layout import WrittenLayout

Weights = MutableMapping[str, mx.array]


def rewrite(
    weights: Weights,
    row: Row,
    config: Mapping[str, Any],
    wanted: WrittenLayout,
    *,
    tensors: Mapping[str, TensorInfo] | None = None,
    linear: Callable[[str], bool] = lambda name: False,
    dtype: str = "bfloat16",
) -> Iterator[tuple[str, mx.array]]:
    """Yield a checkpoint's tensors in the wanted layout.

    The whole rewrite is planned, or refused, before the first tensor is read.

    Args:
        weights: name → array, FP8 as ``uint8``; emptied except for extra tensors.
        row: the row of the checkpoint's module.
        config: the checkpoint's config.
        wanted: the layout to write.
        tensors: the headers of ``weights``, with the dtypes that MLX reports as ``uint8``; if
            None, these dtypes are inferred from neighbouring tensors.
        linear: whether a float weight ``[O, I]`` that is not an expert is written in the wanted
            number form.
        dtype: the dtype of dequantised weights where floats are written.

    Raises:
        LayoutError: the tensors contradict each other or the config.
        SettingError: the layout names a path or a spelling that the row does not have.
        UnsupportedCheckpointError: a layout or number form cannot be read or written.
        CheckpointFileError: a tensor cannot be read.
        InsufficientMemoryError: memory ran out.
    """
    infos = tensors if tensors is not None else infer_dtypes(tensor_infos(weights))
    layout = detect(infos, config, row.ignored)
    plan = plan_rewrite(layout, row, config, wanted, linear)
    for name in layout.numbers.unused:
        weights.pop(name, None)
    return run_rewrite(plan, weights, dtype, {n: info.file for n, info in infos.items()})


def run_rewrite(
    plan: RewritePlan, weights: Weights, dtype: str, files: Mapping[str, str] | None = None
) -> Iterator[tuple[str, mx.array]]:
    """Yield the tensors of the steps, then the unchanged ones.

    Args:
        plan: a plan for exactly these tensors.
        weights: name → array; tensors are removed as they are read.
        dtype: ``bfloat16``, ``float16`` or ``float32``: the dtype of dequantised weights.
        files: source → file, for messages.

    Raises:
        CheckpointFileError: a tensor cannot be read.
        InsufficientMemoryError: memory ran out.
    """
    for step in plan.steps:
        yield from _run_step(step, weights, dtype, files or {})
        mx.clear_cache()
    for name in plan.kept:
        yield name, weights.pop(name)


def _run_step(
    step: RewriteStep, weights: Weights, dtype: str, files: Mapping[str, str]
) -> Iterator[tuple[str, mx.array]]:
    dtype = "float32" if step.quantizes else dtype
    made: dict[str, Arrays] = {}
    for build in step.builds:
        try:
            if step.stays_stored:
                operand = _move(build.ops, take(build, weights))
                for number, name in enumerate(build.targets):
                    parts = {role: [arrays[number]] for role, arrays in operand.parts.items()}
                    made[name] = Arrays([operand.weights[number]], parts)
                del operand
            else:
                floats = make_build(build, weights, dtype)
                made |= {name: Arrays([array]) for name, array in floats.items()}
                del floats
        except (RuntimeError, ValueError, MemoryError) as error:
            made.clear()
            raise failure(build, error.with_traceback(None), files) from error
    for write in step.writes:
        operand = Arrays([])
        for name in write.sources:
            part = made.pop(name, None) or Arrays([weights.pop(name)])
            operand.weights += part.weights
            for role, arrays in part.parts.items():
                operand.parts.setdefault(role, []).extend(arrays)
            del part
        if step.stays_stored:
            operand = _move(write.ops, operand)
        else:
            for op in write.ops:
                operand = run(op, operand, dtype)
        found = [*operand.weights, *(a for role, _ in write.parts for a in operand.parts[role])]
        del operand
        if write.ops:
            mx.eval(found)
        for name in write.names:
            yield name, found.pop(0)


def _move(ops: Sequence[Op], operand: Arrays) -> Arrays:
    """Apply operations that move values to weights ``[…, O, I]`` and parts ``[…, o, i]``."""
    for op in ops:
        parts = {role: _moved(op, arrays) for role, arrays in operand.parts.items()}
        operand = Arrays(_moved(op, operand.weights), parts)
    return operand


def _moved(op: Op, given: Sequence[Any]) -> list[mx.array]:
    moved = run(op, Arrays(list(given)), "float32").weights
    return [array.all() if isinstance(array, Stack) else array for array in moved]
