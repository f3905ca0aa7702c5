"""``inspect`` and a load of the same folder, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vllm_moe_compat.commands.inspect.collect import SHOWN, inspect
from vllm_moe_compat.commands.inspect.steps import steps
from vllm_moe_compat.load import hooks
from vllm_moe_compat.plan.planned_load import PlannedLoad


@contextmanager
def planned_loads() -> Iterator[list[PlannedLoad]]:
    """Collect the plans of the loads inside."""
    plans: list[PlannedLoad] = []
    make = hooks.make

    def noting(*args: Any) -> PlannedLoad:
        plans.append(make(*args))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "make", noting)
        yield plans


def check_agreement(folder: Path, plans: list[PlannedLoad], refusal: str | None) -> None:
    """See that inspect says what the load did: verdict, exit code, message, steps, warnings.

    Args:
        folder: of the checkpoint.
        plans: of its load.
        refusal: what the load was refused with; None where it went through.
    """
    report = inspect(str(folder))
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if refusal is not None:
        assert report.exit_code != 0, refusal
        assert report.verdict == "refuses"
        assert any(error.message[:1000] in refusal for error in errors), (errors, refusal)
        return
    assert (report.exit_code, errors) == (0, [])
    (planned,) = plans
    if planned.row is None:
        return
    assert planned.plan is not None
    assert planned.layout is not None
    assert report.verdict == "loads"
    assert report.ours is not None
    put_in = [words for _, words in planned.fixes]
    wanted = steps(planned.plan, planned.layout, planned.row, planned.translated, put_in)
    assert report.ours.steps == wanted
    warned = [found.message for found in report.findings if found.id == "setting-unknown"]
    own = [found.message for found in planned.warnings if found.id == "setting-unknown"]
    assert warned[:SHOWN] == own[:SHOWN]
