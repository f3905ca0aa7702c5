"""Every family in every form: the logits are transformers', or the refusal is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_moe_compat
from parity.daily import DAILY, in_every_shape, shape_of
from parity.families import FAMILIES
from parity.family import Family
from parity.forms import CELLS, FORM_BY_NAME, Form, applies, build
from parity.refused import REFUSED
from parity.verdict import Verdict, judge, stock
from support.agreement import check_agreement, planned_loads
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.plan.planned_load import PlannedLoad

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


def lanes() -> list[Any]:
    """Return the matrix, with the mark ``full`` on cells outside the daily choice."""
    return [
        pytest.param(
            family, form, marks=() if (family.name, form.name) in DAILY else pytest.mark.full
        )
        for family, form in CELLS
    ]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


@pytest.mark.parametrize(("family", "form"), lanes(), ids=lambda value: value.name)
def test_the_logits_are_those_of_transformers(
    family: Family, form: Form, tmp_path: Path, record_parity: Callable[..., None] | None
):
    cell = build(family, form)
    folder = cell.write(tmp_path)
    with planned_loads() as plans:
        found = judge(folder, cell.reference, max(family.tolerance, form.tolerance))
    refusal = found.why if found.word == "refused" else None
    check_agreement(folder, plans, refusal)
    if record_parity is not None:
        with stock():
            upstream = judge(folder, cell.reference, family.tolerance)
        record_parity(family, form, found, upstream)
    check(found, REFUSED.get((family.name, form.name)))
    if form.packed is not None:
        check_held(plans)


def check_held(plans: list[PlannedLoad]) -> None:
    """See that the load held what the plan, and so ``inspect``, had said."""
    (planned,), report = plans, last_report()
    assert report is not None
    assert planned.plan is not None
    held, dequantized = planned.plan.held, planned.plan.dequantized
    assert (held, dequantized) == (report.held_packed, report.dequantized)
    assert held + dequantized > 0


def check(found: Verdict, refusal: str | None) -> None:
    if refusal is None:
        assert found.word == "right", found
    else:
        assert found.word == "refused", found
        assert refusal in found.why


def test_refusals_are_of_forms_that_exist():
    for family, form in REFUSED:
        assert applies(FAMILIES[family], FORM_BY_NAME[form])


def test_the_daily_cells_cover_every_row_and_every_form_of_every_shape():
    daily = [(family, form) for family, form in CELLS if (family.name, form.name) in DAILY]
    assert {family.name for family, _ in daily} == set(FAMILIES)
    for name in ("release", "saved"):
        own = {family.name for family, form in daily if form.name == name}
        assert own == {f.name for f in FAMILIES.values() if applies(f, FORM_BY_NAME[name])}
    covered = {(shape_of(family), form.name) for family, form in daily}
    every = {(shape_of(family), form.name) for family, form in CELLS if in_every_shape(form)}
    assert every <= covered
    assert {form.name for _, form in daily} == {form.name for _, form in CELLS}
    # Else a field of rows that the plan does not depend on counts as part of their shape.
    assert len(daily) < 0.7 * len(CELLS)
