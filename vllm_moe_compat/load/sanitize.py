"""What happens to the tensors of one load, between the loader's dict and its report.

In go the row, the context that ``load_config`` left (or none) and the loader's dict;
out come what upstream's ``sanitize`` made of it and a ``LoadReport``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.numbers.fp8 import infer_fp8
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load import context as loads
from vllm_moe_compat.load.progress import bar
from vllm_moe_compat.load.report import LoadReport
from vllm_moe_compat.plan.estimate import nbytes
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.plan.planner import Plan, make_plan

Sanitize: TypeAlias = Callable[[dict[str, Any]], Any]


def carry_out(
    row: Row,
    load: loads.LoadContext | None,
    model: Any,
    weights: dict[str, Any],
    sanitize: Sanitize,
) -> tuple[Any, LoadReport]:
    """Carry the plan out and sanitize; or both at once, packing tensors as they are made.

    Args:
        row: of the class that is being loaded.
        load: what ``load_config`` planned; None where nobody called it.
        model: the instance.
        weights: the loader's dict, changed in place.
        sanitize: upstream's.

    Raises:
        CompatError: before anything in ``weights`` was changed, or with all of it let go of.
    """
    import mlx.core as mx

    from vllm_moe_compat.execute import quantize as requantize
    from vllm_moe_compat.execute.quantization_policy import Choices, held, saved
    from vllm_moe_compat.execute.run_plan import execute, packed_dtype, target_dtype

    start = time.perf_counter()
    plan, tensors, path = _plan(row, load, model, weights)
    setting = "none" if load is None else load.setting
    read = sum(nbytes(tensors[name]) for name in weights if name in tensors)
    works = bool(plan.builds) or setting != "none"
    before = mx.get_active_memory()
    if works:
        mx.reset_peak_memory()
    later = loads.deferred.get()
    if load is None or (setting == "none" and later is None):
        # A checkpoint that is not dequantised keeps its dtype unless one was asked for.
        dtype = target_dtype() if plan.dequantized else loads.serving_dtype.get()
        files = {name: info.file for name, info in tensors.items()}
        with bar(sum(len(build.weights) for build in plan.builds)) as done:
            execute(plan, weights, dtype or "bfloat16", files, done)
        seconds = time.perf_counter() - start
        sanitized = sanitize(weights)
        choices = Choices()
        if not plan.dequantized:
            dtype = None
    else:
        spare = loads.spared(load.original_config, setting)
        packing = QUANTIZE_SETTINGS.get(setting)
        job = requantize.Job(plan, tensors, packing, spare, target_dtype(), packed_dtype())
        with bar(0 if later else len(weights)) as done:
            run = later or requantize.execute
            sanitized, choices = run(job, weights, sanitize, model, done)
        if packing is not None:
            # ``load_model`` goes on with this very dict, and packs its modules by it.
            load.config["quantization"].update({p: o.config for p, o in choices.overrides.items()})
        seconds = time.perf_counter() - start
        dtype = packed_dtype()
    return sanitized, LoadReport(
        path=path,
        module=plan.module,
        words=plan.words,
        experts=plan.experts,
        layers=plan.stacked,
        dequantized=plan.dequantized,
        digested=plan.digested,
        dtype=dtype,
        seconds=seconds,
        setting=setting,
        quantized=len(choices.formats),
        odd=len(choices.odd),
        spared=len(choices.spared),
        read=read,
        held=held(sanitized, choices),
        saved=saved(sanitized, choices),
        peak=mx.get_peak_memory() - before if works else 0,
    )


def _plan(
    row: Row, load: loads.LoadContext | None, model: Any, weights: dict[str, Any]
) -> tuple[Plan, dict[str, TensorInfo], str | None]:
    """Return the plan for these tensors, their descriptions, and where they come from."""
    from vllm_moe_compat.execute.run_plan import describe, target_dtype

    given = describe(weights)
    if load is not None and load.matches(given):
        load.check_files()
        return load.plan, dict(load.tensors), str(load.model_dir)
    tensors = infer_fp8(given)
    layout = detect(tensors, _config_of(model), row.ignored)
    split = load is not None and load.setting != "none"
    exact = target_dtype() != "bfloat16"
    config = _config_of(model)
    plan = make_plan(layout, row, config, split=split, exact=exact, direct=load is None)
    return plan, tensors, None


def _config_of(model: Any) -> dict[str, Any]:
    """Return the config as far as a model instance knows it."""
    args = getattr(model, "args", None)
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        return {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    return {}
