"""Render an inspection as Markdown, for an issue."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_moe_compat.commands.inspect.model import Inspection
from vllm_moe_compat.commands.inspect.words import sections

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#~$@!"})


def render(found: Inspection) -> str:
    """Return the report; text from the checkpoint is escaped, so that it makes no links."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Inspection) -> Iterator[str]:
    yield f"### `vllm-moe-compat inspect`: {escape(found.path)}"
    for section in sections(found):
        yield from ("", f"**{escape(section.title)}**", "")
        yield from (f"- {escape(label)}: {escape(words)}" for label, words in section.pairs)
        if section.table is not None:
            columns, rows = section.table.columns, section.table.rows
            yield from ("", _row(columns), "|" + "---|" * len(columns))
            yield from map(_row, rows)
    yield from ("", "**Findings**", "")
    if not found.findings:
        yield "None."
    for finding in found.findings:
        remedy = f"; {finding.remedy}." if finding.remedy else ""
        yield f"- {finding.severity} `{finding.id}`: {escape(finding.message + remedy)}"
    yield from ("", f"{escape(found.tool)}, report version {found.schema_version}")


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(escape, cells)) + " |"


def escape(text: str) -> str:
    """Escape the characters that have a meaning in Markdown or on GitHub."""
    return text.translate(_SPECIAL).replace("://", ":\u200b//")
