"""What the two hooks do; ``patching`` puts them in place.

A load passes ``load_config`` first and the class's ``sanitize`` second. Where a
``sanitize`` is called with tensors that no ``load_config`` announced (other
loaders and tests do that), the plan is made from the dict alone.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias

from vllm_moe_compat import context as loads
from vllm_moe_compat import registry
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.errors import CheckpointFileError, UnsupportedCheckpointError
from vllm_moe_compat.layout import TensorInfo, detect, infer_fp8, read_headers
from vllm_moe_compat.layout.headers import weight_files
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan import QUANTIZE_SETTINGS, Plan, Row, make_plan
from vllm_moe_compat.plan.estimate import estimate, nbytes
from vllm_moe_compat.progress import bar
from vllm_moe_compat.report import LoadReport

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
        ensure: sees that a row's class is wrapped; returns why it cannot be.
        utils: the module ``mlx_lm.utils``.
        original: its ``load_config(model_path)``.
        *args: passed on.
        **kwargs: passed on.

    Raises:
        CompatError: the checkpoint cannot be loaded right.
    """
    loads.current.set(None)
    config = original(*args, **kwargs)
    path = args[0] if args else kwargs.get("model_path")
    if not isinstance(config, dict) or path is None:
        return config
    model_dir = Path(path)
    if not weight_files(model_dir):
        return config  # A tokenizer's folder, or mlx-lm will say what is missing.

    quiet = _asked_for_tokenizer(utils)
    row, module, reason = _find_row(ensure, utils, config)
    setting = "none" if quiet else QUANTIZE.read()
    if row is None:
        if module and setting != "none":
            raise UnsupportedCheckpointError(
                f"{model_dir}: {module} cannot be quantised while loading, since {reason}; unset "
                f"{QUANTIZE.name}, or quantise the checkpoint with `mlx_lm.convert -q`."
            )
        if module and not quiet:
            _warn(model_dir, module, reason)
        return config
    if quiet and QUANTIZE.read() != "none":
        return config
    load = loads.prepare(model_dir, config, row, setting)
    if not quiet:
        _check_memory(load)
        loads.current.set(load)
    return config


def _check_memory(load: loads.LoadContext) -> None:
    """Refuse or warn of a load that the machine has no memory for; reads nothing."""
    if not load.plan.builds and load.setting == "none":
        return  # mlx-lm reads it as it likes, lazily if asked.
    from vllm_moe_compat.execute import packed_dtype, target_dtype
    from vllm_moe_compat.memory import check
    from vllm_moe_compat.requantize import is_listed

    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    ignored = load.row.ignored.select(load.tensors)
    tensors = {name: info for name, info in load.tensors.items() if name not in ignored}
    # A module that has no row of its own in the list is spared with its parent.
    spare: dict[str, set[str]] = {}
    for setting in QUANTIZE_SETTINGS:
        entries = loads.spared(load.original_config, setting)
        spare[setting] = {
            name
            for name, info in tensors.items()
            if entries
            and info.dtype != "F8_E4M3"
            and is_listed(name.removesuffix(".weight"), entries)
        }
    needs = estimate(load.plan, tensors, names[target_dtype()], names[packed_dtype()], spare)
    check(load.model_dir, needs, load.setting)


def sanitize_hook(
    owner: type, original: Callable[..., Any], model: Any, weights: Any, *args: Any, **kwargs: Any
) -> Any:
    """Carry out the plan on the tensors, then let upstream's ``sanitize`` go on.

    Models nest; the outermost wrapped one owns the load, inner ones pass through.

    Args:
        owner: the class that was patched.
        original: its ``sanitize(self, weights)``.
        model: the instance.
        weights: the loader's dict, changed in place.
        *args: passed on.
        **kwargs: passed on.

    Raises:
        CompatError: before anything in ``weights`` was changed.
    """
    row = registry.row_for(owner)
    if row is None or _inside.get() or not isinstance(weights, dict):
        return original(model, weights, *args, **kwargs)
    token = _inside.set(True)
    try:
        load = loads.current.get()
        if load is not None and load.row != row:
            load = None
        carry_out = _transform if load is None or load.setting == "none" else _requantize
        sanitized, report = carry_out(
            row, load, model, weights, lambda given: original(model, given, *args, **kwargs)
        )
    finally:
        _inside.reset(token)
        loads.current.set(None)
    loads.remember(report)
    logger.info("%s", report)
    return sanitized


Sanitize: TypeAlias = Callable[[dict[str, Any]], Any]


def _plan(
    row: Row, load: loads.LoadContext | None, model: Any, weights: dict[str, Any]
) -> tuple[Plan, dict[str, TensorInfo], str | None]:
    """Return the plan for these tensors, their descriptions, and where they come from."""
    from vllm_moe_compat.execute import describe

    given = describe(weights)
    if load is not None and load.matches(given):
        load.check_files()
        return load.plan, dict(load.tensors), str(load.model_dir)
    tensors = infer_fp8(given)
    layout = detect(tensors, _config_of(model), row.ignored)
    split = load is not None and load.setting != "none"
    return make_plan(layout, row, _config_of(model), split=split), tensors, None


def _transform(
    row: Row,
    load: loads.LoadContext | None,
    model: Any,
    weights: dict[str, Any],
    sanitize: Sanitize,
) -> tuple[Any, LoadReport]:
    """Carry out the plan, then sanitize."""
    import mlx.core as mx

    from vllm_moe_compat.execute import execute, target_dtype
    from vllm_moe_compat.requantize import Choices, held

    start = time.perf_counter()
    plan, tensors, path = _plan(row, load, model, weights)
    # A checkpoint that is not dequantised keeps its dtype unless one was asked for.
    dtype = target_dtype() if plan.dequantized else loads.serving_dtype.get()
    before = mx.get_active_memory()
    if plan.builds:
        mx.reset_peak_memory()
    read = sum(map(nbytes, (tensors[n] for n in weights if n in tensors)))
    files = {name: info.file for name, info in tensors.items()}
    with bar(sum(len(build.weights) for build in plan.builds)) as done:
        execute(plan, weights, dtype or "bfloat16", files, done)
    seconds = time.perf_counter() - start
    sanitized = sanitize(weights)
    return sanitized, LoadReport(
        path=path,
        module=plan.module,
        words=plan.words,
        experts=plan.experts,
        layers=plan.stacked,
        dequantized=plan.dequantized,
        dtype=dtype if plan.dequantized else None,
        seconds=seconds,
        read=read,
        held=held(sanitized, Choices()),
        peak=mx.get_peak_memory() - before if plan.builds else 0,
    )


def _requantize(
    row: Row,
    load: loads.LoadContext | None,
    model: Any,
    weights: dict[str, Any],
    sanitize: Sanitize,
) -> tuple[Any, LoadReport]:
    """Sanitize and carry out the plan together, packing every tensor as it is made."""
    import mlx.core as mx

    from vllm_moe_compat import requantize
    from vllm_moe_compat.execute import packed_dtype, target_dtype

    assert load is not None
    start = time.perf_counter()
    plan, tensors, path = _plan(row, load, model, weights)
    packing = QUANTIZE_SETTINGS[load.setting]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    read = sum(map(nbytes, (tensors[n] for n in weights)))
    spare = loads.spared(load.original_config, load.setting)
    job = requantize.Job(plan, tensors, packing, spare, target_dtype(), packed_dtype())
    with bar(len(weights)) as done:
        sanitized, choices = requantize.execute(job, weights, sanitize, model, done)
    # ``load_model`` goes on with this very dict, and packs its modules by it.
    load.config["quantization"].update({p: o.config for p, o in choices.overrides.items()})
    return sanitized, LoadReport(
        path=path,
        module=plan.module,
        words=plan.words,
        experts=plan.experts,
        layers=plan.stacked,
        dequantized=plan.dequantized,
        dtype=packed_dtype(),
        seconds=time.perf_counter() - start,
        setting=load.setting,
        quantized=len(choices.formats),
        odd=len(choices.odd),
        spared=len(choices.spared),
        read=read,
        held=requantize.held(sanitized, choices),
        saved=requantize.saved(sanitized, choices),
        peak=mx.get_peak_memory() - before,
    )


def _config_of(model: Any) -> dict[str, Any]:
    """Return the config as far as a model instance knows it."""
    args = getattr(model, "args", None)
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        return {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    return {}


def _find_row(
    ensure: Callable[[Row], str | None], utils: Any, config: dict[str, Any]
) -> tuple[Row | None, str, str]:
    """Return the row of the class that will be loaded, its module, and why there is none.

    No module means that mlx-lm itself will refuse the model, in its own words.
    """
    if config.get("model_file") is not None:
        return None, str(config["model_file"]), "it is the checkpoint's own code"
    try:
        model_class, _ = utils._get_classes(config)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "", ""
    row = registry.row_for(model_class)
    if row is None:
        return None, model_class.__module__, "it is not in the map of supported modules"
    if (reason := ensure(row)) is not None:
        return None, row.module, reason
    return row, row.module, ""


def _warn(model_dir: Path, module: str, reason: str) -> None:
    """Say that a class is loaded without us though its tensors may need us.

    Nothing is refused here: the model is mlx-lm's to judge, files and config.
    """
    try:
        found = loads.at_risk(detect(read_headers(model_dir), {}))
    except CheckpointFileError:
        return
    if found:
        logger.warning(
            "%s: %s cannot be patched, since %s; its %s are left to mlx-lm as they are",
            model_dir,
            module,
            reason,
            found,
        )


def _asked_for_tokenizer(utils: Any) -> bool:
    """Whether mlx-lm reads the config for a tokenizer's defaults, not for a load.

    It reads it once for each in one ``mlx_lm.load``; only the load has tensors
    to follow. The caller may be behind another library's wrapper or two.
    """
    code = getattr(getattr(utils, "_tokenizer_defaults", None), "__code__", None)
    frame = sys._getframe(1)
    for _ in range(6):
        if frame.f_back is None:
            break
        frame = frame.f_back
        if frame.f_code is code:
            return True
    return False
