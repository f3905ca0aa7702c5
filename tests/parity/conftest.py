from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from parity.family import Family
from parity.forms import Form
from parity.verdict import Verdict


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def record_parity(request: pytest.FixtureRequest) -> Iterator[Callable[..., None] | None]:
    """Collect a row per cell, written as JSON when the session ends."""
    path = request.config.getoption("--record-parity")
    if path is None:
        yield None
        return
    rows: list[dict[str, Any]] = []

    def record(family: Family, form: Form, found: Verdict, upstream: Verdict) -> None:
        rows.append(
            {
                "family": family.name,
                "module": family.module,
                "form": form.name,
                **_fields("", found),
                **_fields("stock_", upstream),
            }
        )

    yield record
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def _fields(prefix: str, verdict: Verdict) -> dict[str, Any]:
    why = " ".join(verdict.why.split())
    return {
        f"{prefix}verdict": verdict.word,
        f"{prefix}distance": verdict.distance,
        f"{prefix}why": why[:300],
    }
