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
from typing import Any

from vllm_moe_compat import context as loads
from vllm_moe_compat import registry
from vllm_moe_compat.errors import CheckpointFileError
from vllm_moe_compat.layout import detect, infer_fp8, read_headers
from vllm_moe_compat.layout.headers import weight_files
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan import Row, make_plan

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
    if row is None:
        if module and not quiet:
            _warn(model_dir, module, reason)
        return config
    load = loads.prepare(model_dir, config, row)
    if not quiet:
        loads.current.set(load)
    return config


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
        report = _transform(row, load, model, weights)
        sanitized = original(model, weights, *args, **kwargs)
    finally:
        _inside.reset(token)
        loads.current.set(None)
    loads.remember(report)
    logger.info("%s", report)
    return sanitized


def _transform(
    row: Row, load: loads.LoadContext | None, model: Any, weights: dict[str, Any]
) -> loads.LoadReport:
    from vllm_moe_compat.execute import describe, execute, target_dtype

    start = time.perf_counter()
    given = describe(weights)
    if load is not None and load.row == row and load.matches(given):
        plan, path = load.plan, str(load.model_dir)
    else:
        layout = detect(infer_fp8(given), _config_of(model), row.ignored)
        plan, path = make_plan(layout, row, _config_of(model)), None
    # A checkpoint that is not dequantised keeps its dtype unless one was asked for.
    dtype = target_dtype() if plan.dequantized else loads.serving_dtype.get()
    execute(plan, weights, dtype or "bfloat16")
    return loads.LoadReport(
        path=path,
        module=plan.module,
        words=plan.words,
        experts=plan.experts,
        layers=plan.stacked,
        dequantized=plan.dequantized,
        dtype=dtype if plan.dequantized else None,
        seconds=time.perf_counter() - start,
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
