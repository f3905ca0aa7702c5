"""Judge rows and their workarounds by probes.

A row is probed in its released form and in the forms that prove its workarounds. Where a
module has several families, those count whose released form mlx-lm gets right: if a model
fails without FP8, its failure with FP8 says nothing about FP8.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_moe_compat.families.row import Row, Workaround
from vllm_moe_compat.probes.results import FAILS, REFUSED, RIGHT, WRONG, Probe

if TYPE_CHECKING:
    from vllm_moe_compat.probes.recipes import Family

ACTIVE, DORMANT, BROKEN = "active", "dormant", "broken"
NEEDED, NOT_PROBED = "needed", "not probed"

RELEASE = "release"
NO_FAMILY = "no checkpoint of this module is recorded"
NO_TIME = "the time for probes was up"
# A failure in these forms has its cause in the form itself, whatever the release does.
_OWN = ("release", "saved config", "in-library")


@dataclass(frozen=True, slots=True)
class WorkaroundStatus:
    """One workaround in one row.

    Attributes:
        id: its short name.
        form: the checkpoint form that it serves.
        state: ``needed`` (mlx-lm fails in at least one probe of it), ``dormant`` (mlx-lm is
            right in all of them), ``not probed``.
        evidence: the results of the probes, or why there was none.
        why: what goes wrong without it.
        upstream: the upstream discussion, or the upstream code.
        remove_when: the condition on which it goes.
    """

    id: str
    form: str
    state: str
    evidence: str
    why: str
    upstream: str
    remove_when: str


@dataclass(frozen=True, slots=True)
class Examined:
    """The probes of one row.

    Attributes:
        probes: in the order in which they ran.
        reason: why there are none; else empty.
    """

    probes: tuple[Probe, ...] = ()
    reason: str = ""


def examine(row: Row, *, patched: bool = True, every: bool = False) -> Examined:
    """Probe one row.

    Args:
        row: of the registry.
        patched: whether to load with the hooks, too.
        every: whether to probe every form of its families, not only those that prove a
            workaround.
    """
    from vllm_moe_compat.probes.probe import probe
    from vllm_moe_compat.probes.recipes import families_of

    found = families_of(row.module)
    if not found:
        return Examined(reason=NO_FAMILY)
    probes: dict[tuple[str, str], Probe] = {}
    for family, form in _cells(row, found, every):
        if (family.name, form) not in probes:
            made = probe(family, row, form, patched=patched)
            if made is not None:
                probes[family.name, form] = made
    return Examined(tuple(probes.values()))


def examine_all(
    rows: Iterable[Row],
    *,
    patched: bool = True,
    every: bool = False,
    seconds: float | None = None,
    progress: Callable[[Row], None] = lambda row: None,
) -> dict[str, Examined]:
    """Probe rows until the time is up; module → its probes.

    Args:
        rows: of the registry.
        patched: whether to load with the hooks, too.
        every: see ``examine``.
        seconds: no row is begun after so many seconds; None sets no limit.
        progress: called before each row.
    """
    begun = time.monotonic()
    found: dict[str, Examined] = {}
    for row in rows:
        if seconds is not None and time.monotonic() - begun > seconds:
            found[row.module] = Examined(reason=NO_TIME)
            continue
        progress(row)
        found[row.module] = examine(row, patched=patched, every=every)
    return found


def _cells(row: Row, found: list[Family], every: bool) -> Iterator[tuple[Family, str]]:
    from vllm_moe_compat.probes.variants import FORMS

    variants = {name for workaround in row.workarounds for name in workaround.families}
    own = [family for family in found if family.name not in variants]
    for family in own:
        yield family, RELEASE
    for workaround in row.workarounds:
        shown = [f for f in found if f.name in workaround.families]
        for family in shown if workaround.families else own:
            yield from ((family, form) for form in workaround.proofs)
    if every:
        yield from ((family, form) for family in own for form in FORMS if form not in _FOR_ONE)


_FOR_ONE = ("nested vision tower", "own output head")  # not every module has one to drop


def proofs(workaround: Workaround, probes: Iterable[Probe]) -> list[Probe]:
    """Return the probes that are evidence for or against the workaround."""
    found = [
        p
        for p in probes
        if p.form in workaround.proofs
        and (p.family in workaround.families or not workaround.families)
    ]
    sound = {p.family for p in probes if p.form == RELEASE and p.upstream.word == RIGHT}
    specific = [p for p in found if p.form in _OWN or p.family in sound]
    return specific or found


def workarounds(row: Row, examined: Examined | None) -> tuple[WorkaroundStatus, ...]:
    """Judge each workaround of the row by its probes."""
    found = []
    for workaround in row.workarounds:
        state, evidence = NOT_PROBED, ""
        if examined is not None:
            state, evidence = _judge(workaround, examined)
        found.append(
            WorkaroundStatus(
                workaround.id,
                workaround.form,
                state,
                evidence,
                workaround.why,
                workaround.upstream,
                workaround.remove_when,
            )
        )
    return tuple(found)


_VERBS = {REFUSED: "refuses", WRONG: "is wrong", FAILS: "fails when run"}


def _judge(workaround: Workaround, examined: Examined) -> tuple[str, str]:
    found = proofs(workaround, examined.probes)
    if not found:
        if workaround.families:
            return NOT_PROBED, f"only {', '.join(workaround.families)} shows it"
        forms = " or ".join(workaround.proofs)
        return NOT_PROBED, examined.reason or f"nothing of this module is recorded as {forms}"
    right = sorted({p.form for p in found if p.upstream.word == RIGHT})
    wrong = {p.form: p.upstream.word for p in found if p.upstream.word != RIGHT}
    words = [f"{form}: mlx-lm {_VERBS[word]}" for form, word in wrong.items()]
    words += [f"{form}: mlx-lm is right" for form in right if form not in wrong]
    return (NEEDED if wrong else DORMANT), "; ".join(words)


def state_of(examined: Examined, entries: Iterable[WorkaroundStatus]) -> tuple[str | None, str]:
    """Return the state of a patched row by its probes, None without a verdict; and why."""
    tried = [p for p in examined.probes if p.patched is not None]
    if not tried:
        return None, f"not probed: {examined.reason}" if examined.reason else ""
    bad = [p for p in tried if p.patched is not None and p.patched.word != RIGHT]
    if bad:
        first = bad[0]
        assert first.patched is not None
        why = f"{first.family}, {first.form}: {first.patched.word} ({first.patched.why[:200]})"
        return BROKEN, why + (f", and {len(bad) - 1} more" if len(bad) > 1 else "")
    states = {entry.state for entry in entries}
    return (DORMANT if states == {DORMANT} else ACTIVE), ""
