"""The state of each hook, as plain data, and the lines that a server logs at start-up.

Probes play no part here. ``probes.status`` joins these states with what probes found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vllm_moe_compat.versions import PackageStatus

PATCHED, WAITING, REVERTED, UNAPPLIED, OFF = "patched", "waiting", "reverted", "not applied", "off"
UNPATCHABLE, DISPLACED = "unpatchable", "displaced"

_LABELS = {WAITING: "waiting for their import"}


@dataclass(frozen=True, slots=True)
class HookStatus:
    """One wrapped function.

    Attributes:
        name: its import path.
        state: ``patched``; ``waiting`` (its module is not imported yet); ``unpatchable``;
            ``displaced`` (another library replaced the wrapper, and the next load puts it
            back); ``reverted``; ``not applied``; ``off`` (``VLLM_MOE_COMPAT=0``).
        reason: why it is unpatchable, else empty.
    """

    name: str
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ClassHook:
    """The hook of ``Model.sanitize`` in one mapped module.

    Attributes:
        module: import path of the module.
        state: as in ``HookStatus``.
        reason: why it is unpatchable, else empty.
        wrapped_by: the module of another library that wraps the same ``sanitize``, outside
            or inside this wrapper; empty where there is none.
        over: whether that wrapper is outside. The next load puts this one outside.
    """

    module: str
    state: str
    reason: str = ""
    wrapped_by: str = ""
    over: bool = False


@dataclass(frozen=True, slots=True)
class Hooks:
    """Every hook of this process.

    Attributes:
        loader: the hook of ``mlx_lm.utils.load_config``, through which every load goes.
        classes: one per row of the registry, in the registry's order.
    """

    loader: HookStatus
    classes: tuple[ClassHook, ...]

    @property
    def installed(self) -> tuple[HookStatus, ...]:
        """The functions that are wrapped now."""
        each = [HookStatus(f"{c.module}.Model.sanitize", c.state, c.reason) for c in self.classes]
        return tuple(hook for hook in (self.loader, *each) if hook.state == PATCHED)


def headline(packages: Iterable[PackageStatus], states: Iterable[str]) -> str:
    """Return the installed packages and the number of modules per state, in one line."""
    installed = ", ".join(str(package) for package in packages if package.version)
    counts = sorted(Counter(states).items())
    modules = ", ".join(f"{count} {_LABELS.get(state, state)}" for state, count in counts)
    return f"vllm_moe_compat with {installed or 'no mlx'}; modules: {modules}"


def problems(
    packages: Iterable[PackageStatus], loader: HookStatus | None, rows: Iterable[ClassHook]
) -> Iterator[str]:
    """Yield each problem in one line.

    Args:
        packages: installed packages with their tested ranges.
        loader: the hook of ``load_config``.
        rows: the modules that are in a bad state, as ``unpatchable``.
    """
    yield from (package.problem for package in packages if package.problem)
    if loader is not None and loader.state == UNPATCHABLE:
        yield f"{loader.name}: {loader.reason}"
    yield from (f"{row.module}: {row.state}, {row.reason}" for row in rows)
