"""Shared by the generated pages: tables, links, writing and checking a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, escaped)])


def codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def link(upstream: str) -> str:
    address, _, rest = upstream.partition(" ")
    return upstream if not address.startswith("https://") else f"<{address}> {rest}".strip()


def finish(page: Path, render: Callable[[], str], command: str, check: bool) -> None:
    """Write the page, or with ``check`` exit with 1 if it is stale."""
    text = render()
    if not check:
        page.write_text(text)
    elif not page.exists() or page.read_text() != text:
        sys.exit(f"docs/{page.name} is stale: run {command}.")


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=command, description=description)
    made.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    return made
