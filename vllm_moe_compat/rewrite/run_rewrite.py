"""A checkpoint's tensors in another layout, one after the other.

Executes what ``plan.inverse`` plans. Tensors leave the caller's dict as they are read
and are handed out as they are made, so what is held at any time is one step: a layer's
gate and up, its down, or a single expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.numbers.fp8 import infer_fp8
from vllm_moe_compat.execute.arrays import Arrays, Stack, run
from vllm_moe_compat.execute.build_tensor import make, take
from vllm_moe_compat.execute.run_plan import describe, failure
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.ops import Op
from vllm_moe_compat.rewrite.planner import Rewriting, Step, plan_rewriting, quantises
from vllm_moe_compat.rewrite.written_layout import Form

Weights = MutableMapping[str, mx.array]


def rewrite(
    weights: Weights,
    row: Row,
    config: Mapping[str, Any],
    form: Form,
    *,
    tensors: Mapping[str, TensorInfo] | None = None,
    linear: Callable[[str], bool] = lambda name: False,
    dtype: str = "bfloat16",
) -> Iterator[tuple[str, mx.array]]:
    """Yield a checkpoint's tensors in the wanted form.

    The whole is planned, and refused where it must be, before the first is read.

    Args:
        weights: name → array, FP8 as ``uint8``; emptied but for what the module ignores.
        row: what is known about the module.
        config: the checkpoint's.
        form: the wanted one.
        tensors: the headers of ``weights``, which know FP8 by its name; else it is
            recognised by its scales.
        linear: which weights ``[O, I]`` an FP8 form is to quantise besides experts and
            those that are FP8 already.
        dtype: what FP8 becomes where the form is none.

    Raises:
        LayoutError: the tensors contradict each other or the config.
        SettingError: the row has nothing of the kind that the form names.
        UnsupportedCheckpointError: a form that is not read, or cannot be written.
        CheckpointFileError: a tensor could not be made.
        InsufficientMemoryError: likewise, for want of memory.
    """
    infos = tensors if tensors is not None else infer_fp8(describe(weights))
    layout = detect(infos, config, row.ignored)
    plan = plan_rewriting(layout, row, config, form, linear)
    for name in layout.fp8.static:
        weights.pop(name, None)
    return carry_out(plan, weights, dtype, {n: info.file for n, info in infos.items()})


def carry_out(
    plan: Rewriting, weights: Weights, dtype: str, files: Mapping[str, str] | None = None
) -> Iterator[tuple[str, mx.array]]:
    """Yield what the steps make and what is kept; ``weights`` loses what was read.

    Args:
        plan: made for exactly these tensors.
        weights: name → array.
        dtype: ``bfloat16``, ``float16`` or ``float32`` for what is dequantised.
        files: where the sources come from, for messages.

    Raises:
        CheckpointFileError: a tensor could not be made.
        InsufficientMemoryError: likewise, for want of memory.
    """
    for step in plan.steps:
        yield from _one(step, weights, dtype, files or {})
        mx.clear_cache()
    for name in plan.kept:
        yield name, weights.pop(name)


def _one(
    step: Step, weights: Weights, dtype: str, files: Mapping[str, str]
) -> Iterator[tuple[str, mx.array]]:
    dtype = "float32" if quantises(step) else dtype
    made: dict[str, Arrays] = {}
    for build in step.there:
        try:
            operand = take(build, weights)
            if step.moved:
                operand = _moved(build.ops, operand)
                scales = operand.scales
                each = zip(build.targets, operand.weights, scales, strict=True)
                made |= {name: Arrays([weight], [scale]) for name, weight, scale in each}
                del operand, scales, each
            else:
                arrays = make(build.ops, operand, build.targets, dtype)
                made |= {name: Arrays([array]) for name, array in arrays.items()}
                del operand, arrays
        except (RuntimeError, ValueError, MemoryError) as error:
            made.clear()
            raise failure(build, error.with_traceback(None), files) from error
    for write in step.back:
        operand = Arrays([])
        for name in write.sources:
            part = made.pop(name, None) or Arrays([weights.pop(name)])
            operand.weights += part.weights
            operand.scales += part.scales
            del part
        if step.moved:
            operand = _moved(write.ops, operand)
        else:
            for op in write.ops:
                operand = run(op, operand, dtype)
        named = [*write.weights, *write.scales]
        found = [*operand.weights, *operand.scales]
        del operand
        if write.ops:
            mx.eval(found)
        for name in named:
            yield name, found.pop(0)


def _moved(ops: Sequence[Op], operand: Arrays) -> Arrays:
    """Do to the scales ``[…, o, i]`` what is done to the weights ``[…, O, I]``."""
    for op in ops:
        weights, scales = (
            run(op, Arrays(list(given)), "float32").weights
            for given in (operand.weights, operand.scales)
        )
        operand = Arrays(_whole(weights), _whole(scales))
    return operand


def _whole(given: Sequence[Any]) -> list[mx.array]:
    return [part.all() if isinstance(part, Stack) else part for part in given]
