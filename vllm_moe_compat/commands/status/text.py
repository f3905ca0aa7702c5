"""Render the status as text: packages, modules by state, workarounds."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_moe_compat.load.hook_status import UNPATCHABLE
from vllm_moe_compat.probes.evidence import (
    ACTIVE,
    BROKEN,
    DORMANT,
    NEEDED,
    NOT_PROBED,
    WorkaroundStatus,
)
from vllm_moe_compat.probes.results import RIGHT, Probe, Verdict
from vllm_moe_compat.probes.status import RowStatus, Status

WIDTH = 120
"""Columns of piped output."""
STYLES = {ACTIVE: "green", BROKEN: "bold red", UNPATCHABLE: "bold red", DORMANT: "yellow"}


def show(status: Status, serves: str, problems: Iterable[str], *, detailed: bool = False) -> None:
    """Print the status.

    Args:
        status: the status of this process.
        serves: who executes models, and why.
        problems: each in one line.
        detailed: whether every probe is printed.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(_packages(status))
    if status.loader is not None:
        console.print(f"\nLoads go through {status.loader.name}: {status.loader.state}")
    console.print(Text(f"Serves: {serves}"), soft_wrap=True)
    console.print()
    console.print(_modules(status.rows))
    if detailed:
        for row in status.rows:
            console.print()
            console.print(_probes(row))
    console.print()
    console.print(_workarounds(status.rows))
    if status.load is not None:
        console.print(f"\nLast load: {status.load}", markup=False)
    console.print()
    for problem in problems:
        console.print(Text(f"Problem: {problem}", style="bold red"), soft_wrap=True)
    console.print(Text(status.headline), soft_wrap=True)


def _packages(status: Status) -> Table:
    table = _table("package", "installed", "tested", "")
    for package in status.packages:
        table.add_row(
            package.name,
            package.version or "-",
            package.tested or "-",
            Text(package.state, style="bold red" if package.problem else ""),
        )
    return table


def _modules(rows: Iterable[RowStatus]) -> Table:
    table = _table("module", "state", "workarounds")
    for row in rows:
        cell = Text(", ".join(map(_short, row.workarounds)) or "none")
        if row.wrapped_by:
            cell.append(f"\n{row.others}: probes go through it", style="yellow")
        if row.reason:
            cell.append(f"\n{row.reason}", style=STYLES.get(row.state, "dim"))
        name = row.module.rpartition(".")[2]
        table.add_row(name, Text(row.state, style=STYLES.get(row.state, "")), cell)
    return table


def _short(entry: WorkaroundStatus) -> str:
    return entry.id if entry.state == NEEDED else f"{entry.id} ({entry.state})"


def _probes(row: RowStatus) -> Table:
    table = _table(row.module.rpartition(".")[2], "form", "mlx-lm alone", "with the plugin", "")
    for probe in row.probes:
        patched = "-" if probe.patched is None else probe.patched.word
        table.add_row(probe.family, probe.form, probe.upstream.word, patched, _why(probe))
    return table


def _why(probe: Probe) -> Text:
    found: Verdict = probe.upstream
    if probe.patched is not None and probe.patched.word != RIGHT:
        found = probe.patched
    return Text(found.why if len(found.why) <= 160 else f"{found.why[:160]}…")


def _workarounds(rows: Iterable[RowStatus]) -> Table:
    """Return a table with each workaround once."""
    found: dict[str, list[WorkaroundStatus]] = {}
    for row in rows:
        for entry in row.workarounds:
            found.setdefault(entry.id, []).append(entry)
    table = _table("workaround", "modules", "why it is there, and what ends it")
    for id_, entries in found.items():
        first = entries[0]
        words = Text(f"{first.why}\nends when {first.remove_when}\n")
        words.append(first.upstream, style="dim")
        table.add_row(id_, _counts(entries), words)
    return table


def _counts(entries: list[WorkaroundStatus]) -> str:
    states = [entry.state for entry in entries]
    if set(states) == {NOT_PROBED}:
        return str(len(states))
    return "\n".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _table(*heads: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    return table
