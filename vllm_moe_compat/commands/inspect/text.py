"""Render an inspection as text with rich, for a terminal or a pipe.

Piped output has no width limit and no colour, so lines are not wrapped and names are not
cut. Text from the checkpoint is never interpreted as rich markup.
"""

from __future__ import annotations

import io
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_moe_compat.commands.inspect.model import Inspection
from vllm_moe_compat.commands.inspect.words import Section, sections

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_PIPED = 100_000


def render(found: Inspection) -> str:
    """Return plain text, each entry on one line however long."""
    out = io.StringIO()
    console = Console(file=out, width=_PIPED, color_system=None, force_terminal=False)
    _print(console, found)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def show(found: Inspection, out: TextIO) -> None:
    """Write to a stream; a terminal gets colour and lines of its width."""
    if out.isatty():
        _print(Console(file=out, highlight=False), found)
    else:
        out.write(render(found))


def _print(console: Console, found: Inspection) -> None:
    console.print(Text(found.path, style="bold"), soft_wrap=True)
    for section in sections(found):
        console.print()
        console.print(Text(section.title, style="bold"))
        console.print(_pairs(section))
        if section.table is not None:
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
            for name in section.table.columns:
                table.add_column(Text(name, style="dim"), overflow="fold")
            for row in section.table.rows:
                table.add_row(*map(Text, row))
            console.print(table)
    console.print()
    console.print(Text("Findings", style="bold"))
    if not found.findings:
        console.print("  none")
    for finding in found.findings:
        line = Text("  ")
        line.append(finding.severity, style=_STYLES[finding.severity])
        line.append(f" {finding.id}: {finding.message}")
        if finding.remedy:
            line.append(f"; {finding.remedy}.")
        console.print(line, soft_wrap=not console.is_terminal)


def _pairs(section: Section) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, words in section.pairs:
        grid.add_row(Text(label, style="dim"), Text(words))
    return grid
