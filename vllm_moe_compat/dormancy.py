"""Which workarounds the installed mlx-lm has made superfluous, by what is recorded of it.

Rows say what a module does not do; a ``Fixed`` of a workaround says since which mlx-lm
version it does, for which module and in which form. ``awake`` gives the row as it is for
the installed version: what upstream does by itself has no step in the plan then. This is
by version alone, since nothing is tried on the way to serving. ``VLLM_MOE_COMPAT_FORCE=1``
keeps every row as it is written.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from typing import Any

from vllm_moe_compat.envs import FORCE
from vllm_moe_compat.families.row import Fixed, Row, Workaround

Learnt = tuple[tuple[Workaround, Fixed], ...]


def awake(row: Row) -> Row:
    """Return the row without what the installed mlx-lm is recorded to do by itself."""
    for workaround, fixed in learnt(row):
        for name, value in fixed.then or workaround.then:
            row = _with(row, name, value)
        if not fixed.then:
            left = tuple(other for other in row.workarounds if other != workaround)
            row = replace(row, workarounds=left)
    return row


def learnt(row: Row) -> Learnt:
    """Return which of the row's workarounds step aside, and by what record; none if forced."""
    if not any(workaround.fixed_in for workaround in row.workarounds) or FORCE.read() == "1":
        return ()
    return _learnt(row, _installed())


def words(row: Row, learnt: Learnt) -> str:
    """Say in one line what is left to mlx-lm."""
    parts = (
        f"{workaround.form} ({workaround.id}, since {fixed.since}"
        + (f", {_fields(fixed)}" if fixed.then else "")
        + ")"
        for workaround, fixed in learnt
    )
    return (
        f"left to mlx-lm {_installed()}, which {row.module} does by itself: {'; '.join(parts)}; "
        f"{FORCE.name}=1 would not leave it"
    )


@lru_cache(maxsize=128)
def _learnt(row: Row, installed: str) -> Learnt:
    from packaging.version import Version

    name = row.module.rpartition(".")[2]
    return tuple(
        (workaround, fixed)
        for workaround in row.workarounds
        for fixed in workaround.fixed_in
        if fixed.module in ("*", name) and Version(installed) >= Version(fixed.since)
    )


def _installed() -> str:
    return metadata.version("mlx-lm")


def _fields(fixed: Fixed) -> str:
    return ", ".join(f"{name} {value}" for name, value in fixed.then)


def _with(row: Row, name: str, value: Any) -> Row:
    """Return the row with one field, or one of its experts' or arithmetic's, as it is then."""
    match name:
        case "fp8":
            return replace(row, fp8=(*row.fp8, *value))
        case "reads":
            moe = row.moe
            return (
                row if moe is None else replace(row, moe=replace(moe, reads=(*moe.reads, *value)))
            )
        case "widens" | "marks":
            rule = row.arithmetic
            return row if rule is None else replace(row, arithmetic=replace(rule, **{name: value}))
        case _:
            return replace(row, **{name: value})
