"""What ``status()`` returns: plain data, readable when printed.

The command ``status``, the server's log and ``status()`` all show this. A row is *patched*
when our hook is in its class. It is *active* only if, besides, a probe through the patched
class has given the right answer; who did not probe does not say so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_moe_compat.load.report import LoadReport
from vllm_moe_compat.versions import PackageStatus

RIGHT, WRONG, REFUSED, FAILS = "right", "wrong", "refused", "fails"

PATCHED, WAITING, REVERTED, UNAPPLIED, OFF = "patched", "waiting", "reverted", "not applied", "off"
UNPATCHABLE, DISPLACED = "unpatchable", "displaced"
ACTIVE, DORMANT, BROKEN = "active", "dormant", "broken"
NEEDED, NOT_PROBED = "needed", "not probed"

_SPOKEN = {WAITING: "waiting for their import"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one load.

    Attributes:
        word: ``right``, ``wrong`` (it loads and computes something else), ``refused`` or
            ``fails`` (it loads and cannot be run).
        why: what was wrong; empty where nothing was.
        distance: max|d| / max|expected| of the logits; None where there were none.
    """

    word: str
    why: str = ""
    distance: float | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """One form of a tiny checkpoint, loaded.

    Attributes:
        family: whose checkpoint.
        form: which form of it.
        oracle: whose numbers were expected: ``transformers``, or ``mlx-lm`` itself.
        upstream: what mlx-lm makes of it without us.
        patched: what comes out with us; None where that was not tried.
    """

    family: str
    form: str
    oracle: str
    upstream: Verdict
    patched: Verdict | None = None


@dataclass(frozen=True, slots=True)
class WorkaroundStatus:
    """One workaround in one row.

    Attributes:
        id: its short name.
        form: the checkpoint form that it serves.
        state: ``needed`` (upstream fails in a probe of it), ``dormant`` (upstream is right
            in all of them), ``not probed``.
        evidence: what the probes said, or why there was none.
        why: what goes wrong without it.
        upstream: where upstream discusses it, or where its code is.
        remove_when: what ends it.
    """

    id: str
    form: str
    state: str
    evidence: str
    why: str
    upstream: str
    remove_when: str


@dataclass(frozen=True, slots=True)
class RowStatus:
    """One mapped module.

    Attributes:
        module: its import path.
        class_name: the class whose ``sanitize`` is wrapped.
        state: patched, not probed; waiting (not imported yet); unpatchable; displaced
            (another library took ours out, the next load puts it back); reverted; not
            applied; off (switched off by the environment). Probed and patched: active;
            dormant (upstream gets every probe right by itself); broken (a probe through
            the patched class went wrong).
        reason: why it is unpatchable, broken or not probed, else empty.
        workarounds: what is done for it.
        probes: what was tried.
        wrapped_by: the module of another library's wrapper round the same ``sanitize``,
            over ours or under it; empty where there is none. Probes of upstream go
            through it, too.
    """

    module: str
    class_name: str
    state: str
    reason: str = ""
    wrapped_by: str = ""
    workarounds: tuple[WorkaroundStatus, ...] = ()
    probes: tuple[Probe, ...] = ()

    @property
    def problem(self) -> bool:
        """Whether the row does not do what it is there for."""
        return self.state in (UNPATCHABLE, BROKEN)


@dataclass(frozen=True, slots=True)
class HookStatus:
    """One function that calls pass through, and in which state; see ``RowStatus``."""

    name: str
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """What is patched in this process.

    Attributes:
        rows: every mapped module.
        hooks: the functions that are wrapped now.
        versions: installed distributions → version.
        packages: the same with the ranges that were tested, and what is missing.
        load: what the last load did, or None before the first.
        loader: the hook of ``mlx_lm.utils.load_config``, through which every load goes.
    """

    rows: tuple[RowStatus, ...]
    hooks: tuple[HookStatus, ...]
    versions: Mapping[str, str]
    packages: tuple[PackageStatus, ...] = ()
    load: LoadReport | None = None
    loader: HookStatus | None = None

    @property
    def headline(self) -> str:
        """What is installed and how many rows are in which state, in one line."""
        installed = ", ".join(str(package) for package in self.packages if package.version)
        counts = Counter(row.state for row in self.rows)
        each = sorted(counts.items())
        counted = (f"{count} {_SPOKEN.get(name, name)}" for name, count in each)
        states = ", ".join(counted)
        return f"vllm_moe_compat with {installed or 'no mlx'}; modules: {states}"

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, each in one line; empty where all is well."""
        found = [package.problem for package in self.packages if package.problem]
        if self.loader is not None and self.loader.state == UNPATCHABLE:
            found.append(f"{self.loader.name}: {self.loader.reason}")
        found += [f"{row.module}: {row.state}, {row.reason}" for row in self.rows if row.problem]
        return tuple(found)

    def __str__(self) -> str:
        lines = [self.headline]
        lines += [f"  hook {hook.name}" for hook in self.hooks] or ["  no hook is installed"]
        for row in self.rows:
            shim = f" (wrapped by {row.wrapped_by}, too)" if row.wrapped_by else ""
            reason = f": {row.reason}" if row.reason else ""
            lines.append(f"  {row.module}: {row.state}{shim}{reason}")
            lines += [
                f"    {entry.id}: {entry.state}" + (f", {entry.evidence}" if entry.evidence else "")
                for entry in row.workarounds
                if row.probes
            ]
        if self.load is not None:
            lines.append(f"  last load: {self.load}")
        return "\n".join(lines)
