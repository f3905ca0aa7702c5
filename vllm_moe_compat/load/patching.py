"""Two hooks into mlx-lm, and how to take them out again.

``mlx_lm.utils.load_config`` is where a load begins: the plan is made there, and
whatever is wrong is said there, before a tensor is read. ``Model.sanitize`` of
every class in the registry is where the tensors pass: the plan is carried out
there. Neither imports a model to look for it; classes are wrapped when their
module is imported, or at once if it is there already.

Another library may wrap the same functions, before us or after. What we put in
is kept in a table, (owner, name) → ``Patch``: taking it out restores the exact
original where ours is outermost, and makes ours transparent where it is not.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from vllm_moe_compat.envs import ENABLED
from vllm_moe_compat.families import registry
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load import status as state
from vllm_moe_compat.load.hooks import load_config_hook, sanitize_hook
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.load.status import HookStatus, RowStatus, Status
from vllm_moe_compat.log import logger
from vllm_moe_compat.versions import packages, versions

if TYPE_CHECKING:
    from vllm_moe_compat.probes.evidence import Examined

LOADER = ("mlx_lm.utils", "load_config")


@dataclass(slots=True, eq=False)
class Patch:
    """One function replaced by ours, or one put where there is none.

    A class without ``sanitize`` takes the weights as they are; ours then hands them on.

    Attributes:
        owner: the class or module that holds it.
        name: under which name.
        original: what was there: the function, or for an inherited one None.
        active: whether ours does anything, or only calls on.
        wrapper: what we put there.
    """

    owner: Any
    name: str
    original: Any
    active: bool = True
    wrapper: Any = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call what was there; an inherited method is looked up anew."""
        if self.original is not None:
            return self.original(*args, **kwargs)
        inherited = getattr(super(self.owner, args[0]), self.name, None)
        return inherited(*args[1:], **kwargs) if inherited is not None else args[1]

    @property
    def outermost(self) -> bool:
        """Whether callers meet our wrapper first."""
        return vars(self.owner).get(self.name) is self.wrapper

    @property
    def in_place(self) -> bool:
        """Whether calls reach our wrapper at all."""
        return _reaches(vars(self.owner).get(self.name), self.wrapper)


_LOCK = threading.RLock()
_PATCHES: dict[tuple[Any, str], Patch] = {}
_UNPATCHABLE: dict[str, str] = {}
_HOOKED: set[str] = set()
_applied = False
_ever_applied = False


def apply() -> None:
    """Install the hooks; idempotent, and complete or not at all.

    Models that are imported later are wrapped when they are. Does nothing where
    ``VLLM_MOE_COMPAT=0``.
    """
    global _applied, _ever_applied
    if ENABLED.read() == "0":
        logger.info("%s=0: nothing is patched", ENABLED.name)
        return
    # Outside our lock, since wrapt calls back and has a lock of its own.
    _watch_imports()
    with _LOCK:
        before = {key: patch.active for key, patch in _PATCHES.items()}
        try:
            for name in _watched():
                if (module := sys.modules.get(name)) is not None:
                    _install_in(module)
        except BaseException:
            for key, patch in list(_PATCHES.items()):
                if not before.get(key, False):
                    _uninstall(patch)
            raise
        first, _applied, _ever_applied = not _ever_applied, True, True
    if first:
        _announce()


def _announce() -> None:
    """Say once per process what the hooks are in for, and what may be wrong."""
    found = status_of({})
    logger.info("%s", found.headline)
    for problem in found.problems:
        logger.warning("%s", problem)


def revert() -> None:
    """Take the hooks out: at once without effect, and gone where nothing is on top."""
    global _applied
    with _LOCK:
        for patch in list(_PATCHES.values()):
            _uninstall(patch)
        _UNPATCHABLE.clear()
        _applied = False


@contextmanager
def applied() -> Iterator[None]:
    """Have the hooks installed inside, and as they were before outside."""
    before = _applied
    apply()
    try:
        yield
    finally:
        if before:
            apply()
        else:
            revert()


def status(*, probe: bool = False) -> Status:
    """Say what is patched, what is not and why.

    Args:
        probe: whether to try every row on tiny checkpoints, through upstream's class and
            through ours, which takes the better part of a minute and imports mlx-lm's
            models. Without it nothing is imported, and no row is called active.
    """
    examined: Mapping[str, Examined] = {}
    if probe:
        from vllm_moe_compat.probes.evidence import examine_all

        examined = examine_all(registry.TRANSFORMS_BY_MODULE.values(), patched=_applied)
    return status_of(examined)


def status_of(examined: Mapping[str, Examined]) -> Status:
    """Say the same, with what probes have said of some modules; module → what was tried."""
    # Not at the top: hooks that only serve need none of it.
    from vllm_moe_compat.probes import evidence

    with _LOCK:
        module = sys.modules.get(LOADER[0])
        loader = _PATCHES.get((module, LOADER[1])) if module is not None else None
        reason = _UNPATCHABLE.get(LOADER[0], "")
        first = HookStatus(".".join(LOADER), _state(module is not None, loader, reason), reason)
        hooks = [first]
        rows = []
        for row in registry.TRANSFORMS_BY_MODULE.values():
            module = sys.modules.get(row.module)
            model = getattr(module, "Model", None)
            patch = _PATCHES.get((model, "sanitize")) if model is not None else None
            reason = _UNPATCHABLE.get(row.module, "")
            found = _state(module is not None, patch, reason)
            hooks.append(HookStatus(f"{row.module}.Model.sanitize", found, reason))
            tried = examined.get(row.module)
            entries = evidence.workarounds(row, tried)
            if found in (state.PATCHED, state.WAITING) and tried is not None:
                judged, reason = evidence.state_of(tried, entries)
                found = judged or found
            probes = () if tried is None else tried.probes
            shim = _other_wrapper(model, patch)
            rows.append(RowStatus(row.module, "Model", found, reason, shim, entries, probes))
    installed = tuple(hook for hook in hooks if hook.state == state.PATCHED)
    return Status(tuple(rows), installed, versions(), packages(), last_report(), first)


def _other_wrapper(model: Any, patch: Patch | None) -> str:
    """Return the module of another library's wrapper round ``sanitize``; empty for none."""
    here = None if model is None else vars(model).get("sanitize")
    for function in (here, None if patch is None else patch.original):
        ours = patch is not None and function is patch.wrapper
        code = getattr(function, "__code__", None)
        if function is None or ours or code is None:
            continue
        home = sys.modules.get(model.__module__)
        if code.co_filename != getattr(home, "__file__", code.co_filename):
            return str(function.__globals__.get("__name__", code.co_filename))
    return ""


def _state(imported: bool, patch: Patch | None, reason: str) -> str:
    if ENABLED.read() == "0":
        return state.OFF
    if not _applied:
        return state.REVERTED if _ever_applied else state.UNAPPLIED
    if reason:
        return state.UNPATCHABLE
    if not imported:
        return state.WAITING
    in_place = patch is not None and patch.active and patch.in_place
    return state.PATCHED if in_place else state.DISPLACED


def ensure(row: Row) -> str | None:
    """See that the row's class is wrapped now; return why it cannot be, or None."""
    with _LOCK:
        if (module := sys.modules.get(row.module)) is not None:
            _install_in(module)
        return _UNPATCHABLE.get(row.module)


def _watched() -> list[str]:
    return [LOADER[0], *registry.TRANSFORMS_BY_MODULE]


def _watch_imports() -> None:
    import wrapt

    for name in _watched():
        if name not in _HOOKED:
            _HOOKED.add(name)
            wrapt.register_post_import_hook(_on_import, name)


def _on_import(module: ModuleType) -> None:
    with _LOCK:
        if _applied:
            _install_in(module)


def _install_in(module: ModuleType) -> None:
    """Wrap what the module holds for us, or note why that is impossible."""
    name = module.__name__
    if name == LOADER[0]:
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
        _install(owner, attribute, hook)
    except (AttributeError, TypeError) as error:
        _UNPATCHABLE[name] = f"its {attribute} cannot be replaced ({error})"
    else:
        _UNPATCHABLE.pop(name, None)


def _as_they_are(model: Any, weights: Any) -> Any:
    """What a class without ``sanitize`` does to its weights."""
    return weights


def _install(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    patch = _PATCHES.get((owner, name))
    if patch is not None and patch.in_place:
        patch.active = True
        return
    if patch is not None:
        patch.active = False
    fresh = Patch(owner, name, vars(owner).get(name))

    @functools.wraps(getattr(owner, name, _as_they_are))
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not fresh.active:
            return fresh.call(*args, **kwargs)
        return hook(fresh.owner, fresh.call, *args, **kwargs)

    fresh.wrapper = wrapper
    setattr(owner, name, wrapper)
    _PATCHES[owner, name] = fresh


def _uninstall(patch: Patch) -> None:
    patch.active = False
    if not patch.outermost:
        return
    if patch.original is None:
        delattr(patch.owner, patch.name)
    else:
        setattr(patch.owner, patch.name, patch.original)
    _PATCHES.pop((patch.owner, patch.name), None)


def _reaches(function: Any, wanted: Any) -> bool:
    """Whether ``function`` is ``wanted`` or a wrapper that holds it.

    Wrappers name what they wrap in ``__wrapped__``, in a closure, in a default
    value, or, when they are partial objects, in ``func``.
    """
    pending: list[Any] = [function]
    seen: set[int] = set()
    while pending and len(seen) < 100:
        candidate = pending.pop()
        if candidate is wanted:
            return True
        if id(candidate) in seen or not callable(candidate):
            continue
        seen.add(id(candidate))
        pending.append(getattr(candidate, "__wrapped__", None))
        pending.append(getattr(candidate, "func", None))
        if isinstance(candidate, FunctionType):
            pending.extend(candidate.__defaults__ or ())
            pending.extend((candidate.__kwdefaults__ or {}).values())
            for cell in candidate.__closure__ or ():
                try:
                    pending.append(cell.cell_contents)
                except ValueError:
                    continue
    return False
