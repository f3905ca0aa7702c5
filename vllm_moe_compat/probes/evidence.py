"""From probes to what they say of a row and of each of its workarounds.

A row is probed in the forms that prove its workarounds, and as it is published. Among
several families of a module those count whose published form upstream gets right: where it
does not, for whatever reason, that it refuses FP8 too proves nothing about FP8.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_moe_compat.families.row import Row, Workaround
from vllm_moe_compat.load.status import (
    ACTIVE,
    BROKEN,
    DORMANT,
    FAILS,
    NEEDED,
    NOT_PROBED,
    REFUSED,
    RIGHT,
    WRONG,
    Probe,
    WorkaroundStatus,
)

if TYPE_CHECKING:
    from vllm_moe_compat.probes.recipes import Family

RELEASE = "release"
NO_FAMILY = "no checkpoint of this module is recorded"
NO_TIME = "the time for probes was up"
# Not what upstream's own tensors look like: other causes of failure do not blur these.
_OWN = ("release", "saved config", "in-library")


@dataclass(frozen=True, slots=True)
class Examined:
    """What was tried of one row.

    Attributes:
        probes: in order.
        reason: why there are none; else empty.
    """

    probes: tuple[Probe, ...] = ()
    reason: str = ""


def examine(row: Row, *, patched: bool = True, every: bool = False) -> Examined:
    """Probe one row.

    Args:
        row: of the registry.
        patched: whether to load with the hooks, too.
        every: every form that its families come in, not only those that prove something.
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
    """Probe rows, as many as the time is enough for; module → what was tried.

    Args:
        rows: of the registry.
        patched: whether to load with the hooks, too.
        every: see ``examine``.
        seconds: no row is begun later than that; None sets no limit.
        progress: is called before each row.
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


_FOR_ONE = ("nested vision tower",)  # not every module has one to drop


def proofs(workaround: Workaround, probes: Iterable[Probe]) -> list[Probe]:
    """Return the probes that say something of the workaround."""
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
    """Say of each of the row's workarounds whether it is needed, and by what evidence."""
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
    """Return the state of a patched row that was probed, None for no verdict, and why."""
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
