"""The status of the package in this process: hooks, probes and workarounds together.

The command ``status`` and ``vllm_moe_compat.status()`` return it. A row is *patched* when
the class carries the hook. It is *active* only if, besides, a probe through the patched
class gave the right logits. Without probing, no row is reported active.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_moe_compat.expert_cache.counters import Counters, counters, layers
from vllm_moe_compat.families import registry
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load import hook_status, patching
from vllm_moe_compat.load.hook_status import (
    PATCHED,
    UNPATCHABLE,
    WAITING,
    ClassHook,
    HookStatus,
)
from vllm_moe_compat.load.report import LoadReport, expert_use, last_report
from vllm_moe_compat.probes import evidence
from vllm_moe_compat.probes.evidence import BROKEN, Examined, WorkaroundStatus
from vllm_moe_compat.probes.results import Probe
from vllm_moe_compat.versions import PackageStatus, packages, versions


@dataclass(frozen=True, slots=True)
class RowStatus:
    """One mapped module.

    Attributes:
        module: its import path.
        class_name: the class whose ``sanitize`` is wrapped.
        state: without probes a state of ``load.hook_status.HookStatus``. With probes, a
            patched or waiting module is ``active`` (every probe through the patched class
            is right), ``dormant`` (so is every probe of its workarounds without the hooks)
            or ``broken`` (a probe through the patched class is not right).
        reason: why it is unpatchable, broken or not probed, else empty.
        workarounds: those of its row.
        probes: those that were run.
        wrapped_by: the module of another library that wraps the same ``sanitize``, outside
            or inside this wrapper; empty where there is none. Probes without the hooks go
            through that wrapper, too.
        over: whether that wrapper is outside. The next load puts this one outside.
    """

    module: str
    class_name: str
    state: str
    reason: str = ""
    wrapped_by: str = ""
    over: bool = False
    workarounds: tuple[WorkaroundStatus, ...] = ()
    probes: tuple[Probe, ...] = ()

    @property
    def others(self) -> str:
        """Where another library's wrapper is, in words; empty where there is none."""
        if not self.wrapped_by:
            return ""
        place = "over this wrapper until the next load" if self.over else "under this wrapper"
        return f"wrapped by {self.wrapped_by}, too, {place}"

    @property
    def problem(self) -> bool:
        """Whether the module is unpatchable or broken."""
        return self.state in (UNPATCHABLE, BROKEN)


@dataclass(frozen=True, slots=True)
class Status:
    """The whole status.

    Attributes:
        rows: every mapped module.
        hooks: the functions that are wrapped now.
        versions: installed distributions → version.
        packages: the same with the tested ranges, and the required packages that are missing.
        load: the report of the last load, or None before the first.
        loader: the hook of ``mlx_lm.utils.load_config``, through which every load goes.
        expert_cache: what the experts that are not all in memory have counted in this process,
            over all layers; None before they are used.
    """

    rows: tuple[RowStatus, ...]
    hooks: tuple[HookStatus, ...]
    versions: Mapping[str, str]
    packages: tuple[PackageStatus, ...] = ()
    load: LoadReport | None = None
    loader: HookStatus | None = None
    expert_cache: Counters | None = None

    @property
    def headline(self) -> str:
        """The installed packages and the number of modules per state, in one line."""
        return hook_status.headline(self.packages, (row.state for row in self.rows))

    @property
    def problems(self) -> tuple[str, ...]:
        """Each problem in one line; empty where there is none."""
        bad = [ClassHook(row.module, row.state, row.reason) for row in self.rows if row.problem]
        return tuple(hook_status.problems(self.packages, self.loader, bad))

    def __str__(self) -> str:
        lines = [self.headline]
        lines += [f"  hook {hook.name}" for hook in self.hooks] or ["  no hook is installed"]
        for row in self.rows:
            shim = f" ({row.others})" if row.wrapped_by else ""
            reason = f": {row.reason}" if row.reason else ""
            lines.append(f"  {row.module}: {row.state}{shim}{reason}")
            lines += [
                f"    {entry.id}: {entry.state}" + (f", {entry.evidence}" if entry.evidence else "")
                for entry in row.workarounds
                if row.probes
            ]
        if self.load is not None:
            lines.append(f"  last load: {self.load}")
        if (use := self.expert_cache) is not None:
            words = expert_use(use.hits, use.misses, use.bytes_read, use.seconds_waited)
            lines.append(f"  {words}")
        return "\n".join(lines)


def status(*, probe: bool = False) -> Status:
    """Return the status of this process.

    Args:
        probe: whether to probe every row on tiny checkpoints, with the hooks and without,
            which takes the better part of a minute and imports mlx-lm's models. Without it
            nothing is imported, and no row is called active.
    """
    examined: Mapping[str, Examined] = {}
    if probe:
        rows = registry.TRANSFORMS_BY_MODULE.values()
        examined = evidence.examine_all(rows, patched=patching.is_applied())
    return status_of(examined)


def status_of(examined: Mapping[str, Examined]) -> Status:
    """Return the status with the given probes; module → its probes."""
    hooks = patching.hooks()
    rows = tuple(
        _row(hook, examined.get(hook.module), registry.TRANSFORMS_BY_MODULE[hook.module])
        for hook in hooks.classes
    )
    cache = counters() if layers() else None
    return Status(rows, hooks.installed, versions(), packages(), last_report(), hooks.loader, cache)


def _row(hook: ClassHook, found: Examined | None, row: Row) -> RowStatus:
    entries = evidence.workarounds(row, found)
    state, reason = hook.state, hook.reason
    if state in (PATCHED, WAITING) and found is not None:
        judged, reason = evidence.state_of(found, entries)
        state = judged or state
    probes = () if found is None else found.probes
    return RowStatus(
        row.module, "Model", state, reason, hook.wrapped_by, hook.over, entries, probes
    )
