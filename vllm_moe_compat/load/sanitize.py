"""Run one load, from the loader's dict to the report.

The plan runs on the tensors, then upstream's ``sanitize``. If weights are quantised while
loading, or stay packed, ``sanitize`` runs first, on stand-ins (``execute.quantize``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.checkpoint.numbers import infer_dtypes
from vllm_moe_compat.envs import EXPERT_CACHE, QUANTIZE
from vllm_moe_compat.errors import LayoutError
from vllm_moe_compat.families.global_scale import take_global_scales
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load.context import LoadContext
from vllm_moe_compat.load.experts_on_disk import Arrangement
from vllm_moe_compat.load.options import load_options, serving_here
from vllm_moe_compat.load.progress import bar
from vllm_moe_compat.load.report import LoadReport
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan.estimate import nbytes
from vllm_moe_compat.plan.make import make_from_tensors
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.plan.planner import Plan
from vllm_moe_compat.plan.quantization import mark_dequantized, spared
from vllm_moe_compat.plan.serving import NONE, Serving

Sanitize: TypeAlias = Callable[[dict[str, Any]], Any]


def run_load(
    row: Row,
    load: LoadContext | None,
    model: Any,
    weights: dict[str, Any],
    sanitize: Sanitize,
) -> tuple[Any, LoadReport]:
    """Run the plan and ``sanitize``; return the sanitized weights and the report.

    Args:
        row: row of the class that is loaded.
        load: the context of the ``load_config`` hook; None if ``load_config`` was not called.
        model: the instance.
        weights: the loader's dict, changed in place.
        sanitize: upstream's, with the row's ``sanitize_wrapper`` if it has one.

    Raises:
        CompatError: the load failed; ``weights`` is unchanged or empty.
    """
    import mlx.core as mx

    from vllm_moe_compat.execute.quantization_policy import (
        QuantizationPolicy,
        bytes_by_format,
        bytes_saved,
        held_formats,
    )
    from vllm_moe_compat.execute.quantize import QuantizedLoad, load_quantized
    from vllm_moe_compat.execute.run_plan import run_plan

    start = time.perf_counter()
    serving = serving_here() if load is None else load.planned.serving
    plan, tensors, path = _plan(row, load, model, weights, serving)
    plan.names.apply(weights)
    setting = NONE if load is None else serving.setting
    read = sum(nbytes(tensors[name]) for name in weights if name in tensors)
    works = bool(plan.builds) or setting != NONE
    before = mx.get_active_memory()
    if works:
        mx.reset_peak_memory()
    executor = load_options().executor
    arrangement = None if load is None else Arrangement(load)
    dtype: str | None
    # A checkpoint without dequantised weights keeps its dtype unless one was set.
    kept = serving.dtype if plan.dequantized else serving.kept_dtype
    if load is not None and load.plan.complete and not plan.complete:
        raise LayoutError(
            f"{load.model_dir}: other code changed the tensors before they reached {row.module}, "
            "so no part of them can be made by itself, where the files' tensors were expected; "
            "leave that code out, or load the whole model."
        )
    plain = setting == NONE and executor is None and not plan.held
    if load is None or (plain and not plan.complete):
        dtype = kept
        files = {name: info.file for name, info in tensors.items()}
        with bar(sum(len(build.weights) for build in plan.builds)) as done:
            run_plan(plan, weights, dtype or "bfloat16", files, done)
        seconds = time.perf_counter() - start
        sanitized = sanitize(weights)
        policy = QuantizationPolicy()
        if not plan.dequantized:
            dtype = None
    else:
        spare = spared(load.planned.original, setting)
        packing = QUANTIZE_SETTINGS.get(setting)
        quantized = QuantizedLoad(
            plan,
            tensors,
            packing,
            spare,
            (kept or "bfloat16") if plain else serving.dtype,
            serving.packed_dtype,
            corrects=executor is None,
        )
        with bar(0 if executor else len(weights)) as done:
            make = executor or partial(load_quantized, arrange=arrangement)
            sanitized, policy = make(quantized, weights, sanitize, model, done)
        if policy.formats:
            # ``load_model`` uses this dict to quantise its modules.
            load.config["quantization"].update({p: o.config for p, o in policy.overrides.items()})
        elif plan.held:
            del load.config["quantization"]
            mark_dequantized(load.config)
        seconds = time.perf_counter() - start
        dtype = serving.dtype if packing is None else serving.packed_dtype
    if load is not None:
        load.check_files()  # Again: values have been read meanwhile.
    if executor is None:
        take_global_scales(model, sanitized)
    return sanitized, LoadReport(
        path=path,
        module=plan.module,
        words=plan.words,
        experts=plan.experts,
        layers=plan.stacked,
        dequantized=plan.dequantized + plan.held - policy.held,
        held_packed=policy.held,
        packed_as=held_formats(policy),
        digested=plan.digested,
        dtype=dtype,
        seconds=seconds,
        setting=setting,
        quantized=len(policy.formats),
        odd=len(policy.odd),
        spared=len(policy.spared),
        read=read,
        held=bytes_by_format(sanitized, policy),
        saved=bytes_saved(sanitized, policy),
        lazy=load is not None and load.lazy,
        peak=mx.get_peak_memory() - before if works else 0,
        expert_cache=None if arrangement is None else arrangement.cache,
        max_length=None if load is None else load.planned.max_length,
        max_length_reason="" if load is None else load.planned.max_length_reason,
    )


def _plan(
    row: Row, load: LoadContext | None, model: Any, weights: dict[str, Any], serving: Serving
) -> tuple[Plan, dict[str, TensorInfo], str | None]:
    """Return the plan for these tensors, their descriptions, and their folder if known."""
    from vllm_moe_compat.execute.run_plan import tensor_infos

    given = tensor_infos(weights)
    if load is not None:
        named = load.plan.names.of(given)
        if load.is_running() or load.matches(named):
            load.check_files()
        if load.matches(named):
            return load.plan, dict(load.planned.headers.tensors), str(load.model_dir)
        if load.is_running() and (changed := load.changed(named)):
            logger.warning(
                "%s: %s reached %s changed, where the tensors of the files were expected; other "
                "code changed them first, and they are loaded as it left them",
                load.model_dir,
                fold(changed),
                row.module,
            )
    tensors = infer_dtypes(given)
    if load is None:
        _warn_of_settings(row, serving)
        # Without load_config, load_model would not quantise its modules.
        serving = dataclasses.replace(serving, setting=NONE)
    plan = make_from_tensors(tensors, row, _config_of(model), serving, direct=load is None)
    return plan, plan.names.of(tensors), None


def _warn_of_settings(row: Row, serving: Serving) -> None:
    """Say which settings have no effect without ``load_config``: there is no file to read later."""
    ignored = [QUANTIZE] if serving.setting != NONE else []
    if serving.experts_apart and row.moe is not None:
        ignored.append(EXPERT_CACHE)
    if ignored:
        logger.warning(
            "%s: Model.sanitize got weights without a load_config before it, so %s without effect; "
            "load the model by mlx_lm.load or mlx_lm.utils.load_model",
            row.module,
            " and ".join(f"{one.name}={one.read()}" for one in ignored)
            + (" is" if len(ignored) == 1 else " are"),
        )


def _config_of(model: Any) -> dict[str, Any]:
    """Return the settings that a model instance has of its config."""
    args = getattr(model, "args", None)
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        return {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    return {}
