"""Install the two hooks into mlx-lm, and take them out again.

A load begins in ``mlx_lm.utils.load_config``: that hook makes the plan and raises every
error about the checkpoint before a tensor is read. ``Model.sanitize`` of each class in the
registry receives the tensors: that hook carries the plan out. No model is imported to be
wrapped; a class is wrapped when its module is imported, or at once if it already is.

Another library may wrap the same functions, earlier or later (``patch``). Each load begins by
putting our wrapper of its class outside any other (``ensure``), so the plan runs first and the
other wrapper receives finished tensors.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vllm_moe_compat.envs import ENABLED
from vllm_moe_compat.families import registry
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load.hook_status import (
    DISPLACED,
    OFF,
    PATCHED,
    REVERTED,
    UNAPPLIED,
    UNPATCHABLE,
    WAITING,
    ClassHook,
    Hooks,
    HookStatus,
    headline,
    problems,
)
from vllm_moe_compat.load.hooks import load_config_hook, sanitize_hook
from vllm_moe_compat.load.patch import Patch, PatchTable
from vllm_moe_compat.load.whole_models import GUARDED
from vllm_moe_compat.load.wrappers import foreign_module
from vllm_moe_compat.log import logger
from vllm_moe_compat.versions import packages

LOADER = ("mlx_lm.utils", "load_config")

_LOCK = threading.RLock()
_PATCHES = PatchTable()
_UNPATCHABLE: dict[str, str] = {}
_HOOKED: set[str] = set()
_applied = False
_ever_applied = False


def apply() -> None:
    """Install the hooks; idempotent, and complete or not at all.

    Models that are imported later are wrapped then. ``VLLM_MOE_COMPAT=0`` installs
    nothing.
    """
    global _applied, _ever_applied
    if ENABLED.read() == "0":
        logger.info("%s=0: nothing is patched", ENABLED.name)
        return
    # Outside our lock, since wrapt calls back and has a lock of its own.
    _watch_imports()
    with _LOCK:
        before = _PATCHES.active()
        try:
            for name in _watched():
                if (module := sys.modules.get(name)) is not None:
                    _install_in(module)
        except BaseException:
            _PATCHES.uninstall(keep=before)
            raise
        first, _applied, _ever_applied = not _ever_applied, True, True
    if first:
        _announce()


def _announce() -> None:
    """Log the versions, the state of the modules and every problem, once per process."""
    found, installed = hooks(), packages()
    logger.info("%s", headline(installed, (row.state for row in found.classes)))
    bad = [row for row in found.classes if row.state == UNPATCHABLE]
    for problem in problems(installed, found.loader, bad):
        logger.warning("%s", problem)


def revert() -> None:
    """Take the hooks out.

    A hook stops acting at once. A wrapper that another library has wrapped stays in place
    and passes calls through.
    """
    global _applied
    with _LOCK:
        _PATCHES.uninstall()
        _UNPATCHABLE.clear()
        _applied = False


@contextmanager
def applied() -> Iterator[None]:
    """Install the hooks for the ``with`` block and restore the earlier state after it."""
    before = _applied
    apply()
    try:
        yield
    finally:
        if before:
            apply()
        else:
            revert()


def is_applied() -> bool:
    """Whether ``apply`` is in force."""
    return _applied


def hooks() -> Hooks:
    """Return the state of every hook; imports nothing."""
    with _LOCK:
        module = sys.modules.get(LOADER[0])
        patch = _PATCHES.get(module, LOADER[1]) if module is not None else None
        reason = _UNPATCHABLE.get(LOADER[0], "")
        loader = HookStatus(".".join(LOADER), _state(module is not None, patch, reason), reason)
        return Hooks(loader, tuple(map(_class_hook, registry.TRANSFORMS_BY_MODULE)))


def _class_hook(name: str) -> ClassHook:
    module = sys.modules.get(name)
    model = getattr(module, "Model", None)
    patch = _PATCHES.get(model, "sanitize") if model is not None else None
    reason = _UNPATCHABLE.get(name, "")
    found = _state(module is not None, patch, reason)
    over = under = ""
    if model is not None:
        outer = vars(model).get("sanitize")
        if patch is None or not patch.outermost:
            over = foreign_module(model, outer)
        if patch is not None:
            under = foreign_module(model, patch.original)
    return ClassHook(name, found, reason, over or under, over=bool(over) and found == PATCHED)


def _state(imported: bool, patch: Patch | None, reason: str) -> str:
    if ENABLED.read() == "0":
        return OFF
    if not _applied:
        return REVERTED if _ever_applied else UNAPPLIED
    if reason:
        return UNPATCHABLE
    if not imported:
        return WAITING
    in_place = patch is not None and patch.active and patch.in_place
    return PATCHED if in_place else DISPLACED


def ensure(row: Row) -> str | None:
    """Make our wrapper of the row's class the outermost; return why that is impossible, or None.

    Called at the beginning of each load. A wrapper that another library has put over ours would
    see the tensors before the plan does, so ours is put over it once more. The class keeps that
    wrapper, since a load in another thread may be anywhere between its two hooks.
    """
    with _LOCK:
        if (module := sys.modules.get(row.module)) is not None:
            _install_in(module)
            if row.module not in _UNPATCHABLE:
                _PATCHES.bring_out(module.Model, "sanitize")
        return _UNPATCHABLE.get(row.module)


def _watched() -> list[str]:
    return [LOADER[0], *registry.TRANSFORMS_BY_MODULE]


def _watch_imports() -> None:
    import wrapt

    for name in _watched():
        if name not in _HOOKED:
            _HOOKED.add(name)
            wrapt.register_post_import_hook(_on_import, name)


def _guard_whole_models() -> None:
    """Wrap the functions that take whole models, as far as there are any."""
    for (module, path), hook in GUARDED.items():
        *classes, name = path.split(".")
        owner = functools.reduce(getattr, classes, sys.modules[module])
        if callable(getattr(owner, name, None)):
            _PATCHES.install(owner, name, hook)


def _on_import(module: ModuleType) -> None:
    with _LOCK:
        if _applied:
            _install_in(module)


def _install_in(module: ModuleType) -> None:
    """Wrap the function that the module holds, or record why that is impossible."""
    name = module.__name__
    if name == LOADER[0]:
        _guard_whole_models()
        owner: Any = module
        attribute = LOADER[1]
        hook: Callable[..., Any] = functools.partial(load_config_hook, ensure)
    else:
        owner = getattr(module, "Model", None)
        attribute, hook = "sanitize", sanitize_hook
        if not isinstance(owner, type):
            _UNPATCHABLE[name] = "it has no class named Model"
            return
    function = getattr(owner, attribute, None)
    if not callable(function) and (name == LOADER[0] or function is not None):
        _UNPATCHABLE[name] = f"it has no {attribute} to wrap"
        if name == LOADER[0]:
            logger.warning("%s has no load_config: checkpoints load unchecked", name)
        return
    try:
        _PATCHES.install(owner, attribute, hook)
    except (AttributeError, TypeError) as error:
        _UNPATCHABLE[name] = f"its {attribute} cannot be replaced ({error})"
    else:
        _UNPATCHABLE.pop(name, None)
