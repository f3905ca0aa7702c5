"""What of a long list is tried each day; the full lane tries all of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from parity.daily import DAILY
from parity.forms import CELLS
from parity.refused import REFUSED


def daily(each_day: Collection[tuple[str, str]], without: Collection[str] = ()) -> list[Any]:
    """Return names of family and form; all but ``each_day`` have the mark ``full``."""
    found = [(family.name, form.name) for family, form in CELLS]
    return [
        pytest.param(*cell, marks=() if cell in each_day else pytest.mark.full)
        for cell in found
        if cell not in REFUSED and cell[0] not in without and (cell in DAILY or cell in each_day)
    ]


def one_in(number: int, values: Iterable[Any]) -> list[Any]:
    """Return values of which the first of each ``number`` is tried each day."""
    return [
        pytest.param(value, marks=() if place % number == 0 else pytest.mark.full)
        for place, value in enumerate(values)
    ]
