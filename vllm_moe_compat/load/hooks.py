"""What the two hooks do; ``patching`` puts them in place.

A load passes ``load_config`` first and the class's ``sanitize`` second. Where a
``sanitize`` is called with tensors that no ``load_config`` announced (other
loaders and tests do that), the plan is made from the dict alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.headers import read_headers, weight_files
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.errors import CheckpointFileError, UnsupportedCheckpointError
from vllm_moe_compat.families import forward_fixes as repairs
from vllm_moe_compat.families import registry
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load import context as loads
from vllm_moe_compat.load import guard
from vllm_moe_compat.load.sanitize import carry_out
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan.estimate import estimate
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS

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
    if loads.aside.get():
        return config
    path = args[0] if args else kwargs.get("model_path")
    if not isinstance(config, dict) or path is None:
        return config
    model_dir = Path(path)
    if not weight_files(model_dir):
        return config  # A tokenizer's folder, or mlx-lm will say what is missing.

    quiet = _asked_for_tokenizer(utils)
    setting = "none" if quiet else QUANTIZE.read()
    read_config = copy.deepcopy(config)
    told = registry.row_of_config(config, utils.MODEL_REMAPPING)
    if config.get("model_file") is not None:
        told = None
    changed = registry.fix_config(told, config) if told is not None else []
    row, module, reason = _find_row(ensure, utils, config)
    if changed and not quiet:
        logger.info("%s: config.json put into mlx-lm's words: %s", model_dir, ", ".join(changed))
    if row is None:
        if module and setting != "none":
            raise UnsupportedCheckpointError(
                f"{model_dir}: {module} cannot be quantised while loading, since {reason}; unset "
                f"{QUANTIZE.name}, or quantise the checkpoint with `mlx_lm.convert -q`."
            )
        if module and not quiet:
            _judge_unmapped(model_dir, module, reason)
        return config
    if quiet and QUANTIZE.read() != "none":
        return config
    from vllm_moe_compat.execute.run_plan import target_dtype

    later = loads.deferred.get() is not None
    exact = later or target_dtype() != "bfloat16"
    load = loads.prepare(model_dir, config, row, setting, original=read_config, exact=exact)
    if not quiet:
        if not later:
            _check_memory(load)
        loads.current.set(load)
    return config


def _check_memory(load: loads.LoadContext) -> None:
    """Refuse or warn of a load that the machine has no memory for; reads nothing."""
    if not load.plan.builds and load.setting == "none":
        return  # mlx-lm reads it as it likes, lazily if asked.
    from vllm_moe_compat.execute.run_plan import packed_dtype, target_dtype
    from vllm_moe_compat.load.memory import check

    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    tensors = {name: info for name, info in load.tensors.items() if name not in load.ignored}
    spare = {
        setting: loads.spared_tensors(load.original_config, tensors, setting)
        for setting in QUANTIZE_SETTINGS
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
        CompatError: before anything in ``weights`` was changed, or with nothing of it
            kept; the guard's, with all of it made and nothing loaded.
    """
    row = registry.row_for(owner)
    if row is None or _inside.get() or loads.aside.get() or not _are_arrays(weights):
        return original(model, weights, *args, **kwargs)
    token = _inside.set(True)
    try:
        load = loads.current.get()
        if load is not None and load.row != row:
            load = None

        def sanitize(given: dict[str, Any]) -> Any:
            return original(model, given, *args, **kwargs)

        def repaired(given: dict[str, Any]) -> Any:
            if row.around is None:
                return sanitize(given)
            return row.around(sanitize, model, given, read_config)

        read_config = {} if load is None else load.original_config
        if load is not None:
            _scale_rope(load, model)
        sanitized, report = carry_out(row, load, model, weights, repaired)
        guard.check(model, sanitized, read_config, "" if load is None else str(load.model_dir))
    finally:
        _inside.reset(token)
        loads.current.set(None)
    loads.remember(report)
    logger.info("%s", report)
    return sanitized


def _are_arrays(weights: Any) -> bool:
    """Whether these are tensors; names alone are for upstream to rename."""
    return isinstance(weights, dict) and all(hasattr(w, "dtype") for w in weights.values())


def _scale_rope(load: loads.LoadContext, model: Any) -> None:
    text = load.config.get("text_config")
    if repairs.scale_rope(model, text if isinstance(text, dict) else load.config):
        logger.info(
            "%s: %s ignores rope_scaling; its rotary embeddings were scaled by the config",
            load.model_dir,
            load.row.module,
        )


_OWN_CODE = "it is the checkpoint's own code"


def _find_row(
    ensure: Callable[[Row], str | None], utils: Any, config: dict[str, Any]
) -> tuple[Row | None, str, str]:
    """Return the row of the class that will be loaded, its module, and why there is none.

    No module means that mlx-lm itself will refuse the model, in its own words.
    """
    if config.get("model_file") is not None:
        return None, str(config["model_file"]), _OWN_CODE
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


def _judge_unmapped(model_dir: Path, module: str, reason: str) -> None:
    """Refuse FP8 for a class without a row; warn of experts that may need one.

    Every other question about such a model is mlx-lm's to judge, files and config.

    Raises:
        UnsupportedCheckpointError: FP8 weights, which its class would take for integers.
    """
    try:
        layout = detect(read_headers(model_dir), {})
    except CheckpointFileError:
        return
    if found := loads.at_risk(layout):
        logger.warning(
            "%s: %s cannot be patched, since %s; its %s are left to mlx-lm as they are",
            model_dir,
            module,
            reason,
            found,
        )
    weights = [*layout.fp8.pairs, *layout.fp8.bare]
    if weights and reason != _OWN_CODE:
        verb = "are" if len(weights) > 1 else "is"
        raise UnsupportedCheckpointError(
            f"{layout.tensors[weights[0]].file}: {fold(weights)} {verb} FP8, which {module} takes "
            f"for integers, and it cannot be patched, since {reason}; load a bf16 release of the "
            "model instead."
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
