"""Running the tests in several processes with pytest-xdist.

A worker takes one file at a time, so that the fixtures of a module (an engine, a server)
start once. The parity tests are divided by family instead: a family's reference takes
longer to make than a comparison with it, and several files use the same reference.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

_FAMILY = re.compile(
    r"tests/parity/test_(?:forms|parity|recorded|rewritten|still_needed)\.py::\w+\[([^-\]]+)"
)


def scope(nodeid: str) -> str:
    """Return the unit of work that a test belongs to: a file, or a family of parity tests."""
    family = _FAMILY.match(nodeid)
    return f"parity of {family[1]}" if family else nodeid.partition("::")[0]


class Scheduling(LoadFileScheduling):
    """xdist's ``--dist loadfile`` with the scopes above, in the order of the collection."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid)


def longest_first(items: list[pytest.Item]) -> None:
    """Move units that start engines to the front; the short ones at the end fill both workers."""
    engines = {scope(item.nodeid) for item in items if item.get_closest_marker("serve")}
    items.sort(key=lambda item: scope(item.nodeid) not in engines)


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workeroutput")


def hand_over(config: pytest.Config, kind: str, values: list[Any]) -> None:
    """Keep values for ``collected``; a worker sends them to the controller at its end."""
    if is_worker(config):
        config.workeroutput.setdefault(kind, []).extend(values)  # type: ignore[attr-defined]
    else:
        config.stash.setdefault(_COLLECTED, {}).setdefault(kind, []).extend(values)


def take_over(config: pytest.Config, output: dict[str, Any]) -> None:
    """Add a worker's values to the controller's."""
    for kind in (NOTES, CELLS):
        hand_over(config, kind, output.get(kind, []))


def collected(config: pytest.Config, kind: str) -> list[Any]:
    return config.stash.get(_COLLECTED, {}).get(kind, [])


NOTES = "notes"  # lines for the summary
CELLS = "cells"  # what --record-parity writes
_COLLECTED = pytest.StashKey[dict[str, list[Any]]]()
