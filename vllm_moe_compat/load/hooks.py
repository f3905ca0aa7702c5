"""The two hooks, which ``patching`` installs.

A load calls ``load_config`` first and the class's ``sanitize`` second. If ``sanitize`` is called
without a preceding ``load_config``, as by other loaders and tests, the plan is made from the
tensors alone.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.adapters import adapter_alone
from vllm_moe_compat.checkpoint.files import refuse
from vllm_moe_compat.checkpoint.headers import weight_files
from vllm_moe_compat.dtypes import STORED_NAMES
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.families import registry
from vllm_moe_compat.families.fixes import rotary
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load import caller, context, guard, memory, zero_biases
from vllm_moe_compat.load.options import load_options, serving_here
from vllm_moe_compat.load.report import remember
from vllm_moe_compat.load.sanitize import run_load
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan.check_expert_cache import with_cache_checked
from vllm_moe_compat.plan.estimate import estimate
from vllm_moe_compat.plan.expert_cache import OFF, CacheSetting, divide
from vllm_moe_compat.plan.expert_layers import planned_experts
from vllm_moe_compat.plan.make import make, name_module
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.plan.planned_load import read_headers_of
from vllm_moe_compat.plan.present_part import present_part
from vllm_moe_compat.plan.quantization import mark_dequantized
from vllm_moe_compat.plan.serving import NONE, installed_device
from vllm_moe_compat.ranks.expected import layer_count, of_layers, ranks_that_share

_inside: ContextVar[bool] = ContextVar("vllm_moe_compat_inside", default=False)


def load_config_hook(
    ensure: Callable[[Row], str | None],
    utils: Any,
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Plan the load whose config is being read.

    Args:
        ensure: wraps a row's class if needed; returns None, or the reason if it cannot.
        utils: the module ``mlx_lm.utils``.
        original: its ``load_config(model_path)``.
        *args: arguments of ``original``.
        **kwargs: keyword arguments of ``original``.

    Raises:
        CompatError: the checkpoint cannot be loaded correctly.
    """
    context.current.set(None)
    path = args[0] if args else kwargs.get("model_path")
    called = caller.find(utils)
    if load_options().hooks and path is not None and not called.tokenizer:
        _refuse_adapter(Path(path))
    config = original(*args, **kwargs)
    if not load_options().hooks or not isinstance(config, dict) or path is None:
        return config
    model_dir = Path(path)
    if called.strict and not weight_files(model_dir):
        return config  # A tokenizer's folder, or mlx-lm reports missing files.
    if called.tokenizer:
        name_module(config)
        return config

    headers = read_headers_of(model_dir)
    if not called.strict:
        headers = present_part(headers)
    planned = make(headers, copy.deepcopy(config), serving_here())
    if (view := load_options().view) is not None:
        planned.refuse()
        planned = view(planned)
    if planned.row is not None and planned.layout is not None:
        try:
            importlib.import_module(planned.row.module)
        except ImportError:
            return config  # mlx-lm reports the missing module.
        if reason := ensure(planned.row):
            planned = with_cache_checked(planned.unpatched(reason))
    if planned.translated:
        keys = ", ".join(planned.translated)
        logger.info("%s: translated config.json keys for mlx-lm: %s", model_dir, keys)
    if planned.needs_row:
        logger.warning(
            "%s: %s cannot be patched, since %s; its %s are left to mlx-lm as they are",
            model_dir,
            planned.module,
            planned.reason,
            planned.needs_row,
        )
    planned.refuse()
    if planned.max_length is not None:
        logger.warning(
            "%s: right up to %d tokens, since beyond that %s",
            model_dir,
            planned.max_length,
            planned.max_length_reason,
        )
    for warning in planned.warnings:
        logger.warning("%s: %s; %s", model_dir, warning.message, warning.remedy)
    if planned.plan is not None and planned.plan.names.words:
        logger.info("%s: tensor names: %s", model_dir, "; ".join(planned.plan.names.words))
    config.clear()
    config.update(planned.config)
    if not headers.tensors and "quantization_config" in config and "quantization" not in config:
        mark_dequantized(config)  # Nothing is there to quantise, and load_model refuses some.
    if planned.row is None or planned.plan is None:
        return config
    load = context.LoadContext(
        model_dir, planned, planned.row, planned.plan, config, headers.stamps, called
    )
    if load_options().executor is None and not load.lazy:
        _check_memory(load)
    context.current.set(load)
    return config


def _refuse_adapter(model_dir: Path) -> None:
    """Refuse a folder that has an adapter and no weights, which may lack a config too.

    Raises:
        CheckpointFileError: the folder is one.
    """
    if not weight_files(model_dir) and (fault := adapter_alone(model_dir)) is not None:
        refuse(fault)


def _check_memory(load: context.LoadContext) -> None:
    """Refuse a load that the machine has no memory for, or warn of it, before reading."""
    serving = load.planned.serving
    if not (load.plan.builds or load.plan.made_upstream) and serving.setting == NONE:
        return  # mlx-lm decides what is read, and when.
    layout = load.planned.layout
    assert layout is not None, "there is a plan"
    spare = {setting: load.planned.spared(setting) for setting in QUANTIZE_SETTINGS}
    options, module = load_options(), load.planned.module
    plan, tensors, ranks = load.plan, layout.tensors, options.ranks
    count = layer_count(load.planned.config)
    if options.layers is not None and count:
        (plan, tensors), ranks = of_layers(plan, tensors, *options.layers(count)), 1
    needs = estimate(
        plan,
        tensors,
        STORED_NAMES[serving.dtype],
        STORED_NAMES[serving.packed_dtype],
        spare,
        ranks_that_share(tensors, ranks, module),
    )
    processes = options.processes
    if options.ranks > 1:  # They have no cache of experts, so none is advised.
        memory.check(load.model_dir, needs, serving.setting, processes=processes)
        return
    try:
        experts = planned_experts(load.planned, serving.setting, installed_device())
    except CompatError:  # They cannot stay on disk, and nobody asked for it.
        memory.check(load.model_dir, needs, serving.setting, processes=processes)
        return
    cache = CacheSetting.read()
    kept = needs
    if cache is not None:
        slots = divide(experts.layers, experts.per_token, cache)
        kept = experts.cached(needs, serving.setting, slots)
    memory.check(
        load.model_dir,
        kept,
        serving.setting,
        OFF if cache is None else cache.words,
        partial(experts.largest_cache, needs, serving.setting),
        processes,
    )


def sanitize_hook(
    owner: type, original: Callable[..., Any], model: Any, weights: Any, *args: Any, **kwargs: Any
) -> Any:
    """Run the plan on the tensors, then call upstream's ``sanitize``.

    Models nest: the outermost wrapped model owns the load, inner ones call their original.

    Args:
        owner: the patched class.
        original: its ``sanitize(self, weights)``.
        model: the instance.
        weights: the loader's dict, changed in place.
        *args: further arguments of ``original``.
        **kwargs: keyword arguments of ``original``.

    Raises:
        CompatError: the checkpoint cannot be loaded correctly. ``weights`` is then unchanged or
            empty, unless the guard raised: it checks the finished tensors.
    """
    row = registry.row_for(owner)
    passes = _inside.get() or not load_options().hooks or not _are_arrays(weights)
    if row is None or passes:
        return original(model, weights, *args, **kwargs)
    from vllm_moe_compat.execute.laziness import building  # imports mlx

    token = _inside.set(True)
    try:
        load = context.current.get()
        if load is not None and load.row != row:
            load = None
        read_config = {} if load is None else load.planned.original

        def sanitize(given: dict[str, Any]) -> Any:
            if row.sanitize_wrapper is None:
                return original(model, given, *args, **kwargs)
            return row.sanitize_wrapper(
                lambda w: original(model, w, *args, **kwargs), model, given, read_config
            )

        if load is not None:
            for fix, words in load.planned.fixes:
                fix.apply(model, load.planned.settings)
                logger.info("%s: put %s into %s", load.model_dir, words, row.module)
            rotary.check(model, load.planned.settings)
        with building(lazily=load is not None and load.lazy):
            sanitized, report = run_load(row, load, model, weights, sanitize)
        if load is not None and load.planned.layout is not None:
            zero_biases.drop(model, sanitized, load.planned.layout)
        guard.check(model, sanitized, read_config, "" if load is None else str(load.model_dir))
    finally:
        _inside.reset(token)
        context.current.set(None)
    if load_options().record:
        remember(report)
    logger.info("%s", report)
    return sanitized


def _are_arrays(weights: Any) -> bool:
    """Whether the dict holds tensors; some callers only have upstream rename keys."""
    return isinstance(weights, dict) and all(hasattr(w, "dtype") for w in weights.values())
