from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from parity.families import LEFT_OUT
from parity.family import Family
from parity.forms import CELLS, Form
from parity.verdict import Verdict
from support import parallel


def pytest_collection_finish(session: pytest.Session) -> None:
    if LEFT_OUT:
        listed = "; ".join(f"{name} ({why})" for name, why in LEFT_OUT.items())
        note = f"left out, since this environment does not have them: {len(LEFT_OUT)}: {listed}"
        parallel.hand_over(session.config, parallel.NOTES, [note])


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def record_parity(request: pytest.FixtureRequest) -> Callable[..., None] | None:
    """Return a function that keeps a row per cell; None without ``--record-parity``."""
    config = request.config
    if config.getoption("--record-parity") is None:
        return None

    def record(family: Family, form: Form, found: Verdict, upstream: Verdict) -> None:
        row = {
            "family": family.name,
            "module": family.module,
            "form": form.name,
            **_fields("", found),
            **_fields("stock_", upstream),
        }
        parallel.hand_over(config, parallel.CELLS, [[CELLS.index((family, form)), row]])

    return record


def _fields(prefix: str, verdict: Verdict) -> dict[str, Any]:
    why = " ".join(verdict.why.split())
    return {
        f"{prefix}verdict": verdict.word,
        f"{prefix}distance": verdict.distance,
        f"{prefix}why": why[:300],
    }
