"""The division of the suite into lanes, and of a run into processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity.daily import DAILY
from parity.forms import CELLS
from support import parallel

ROOT = Path(__file__).resolve().parents[2]
PARITY = "tests/parity/test_parity.py"


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.full
def test_what_is_left_to_the_full_lane_is_counted_and_named():
    result = run_pytest(PARITY, "--collect-only", "-q")
    left = len(CELLS) - len(DAILY)
    assert f"{left} tests are left to the full lane; --full selects them" in result.stdout
    assert result.stdout.count("::test_the_logits") == len(DAILY)


@pytest.mark.full
def test_a_recording_is_of_the_full_matrix_in_its_order(tmp_path: Path):
    """Two processes compare the cells, and the recording has the order of one."""
    file = tmp_path / "cells.json"
    split = ("-n", "2", "--dist", "loadfile")
    result = run_pytest(
        PARITY, "-k", "[seed_oss- or [olmoe- or [qwen3-", *split, "--record-parity", str(file)
    )
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    found = [(row["family"], row["form"]) for row in json.loads(file.read_text())]
    names = {"seed_oss", "olmoe", "qwen3"}
    assert found == [(f.name, form.name) for f, form in CELLS if f.name in names]
    assert not DAILY.issuperset(found)


def test_a_family_or_a_file_stays_in_one_process():
    one = parallel.scope(f"{PARITY}::test_the_logits_are_those_of_transformers[qwen3_moe-saved]")
    recorded = "tests/parity/test_recorded.py::test_logits_are_the_recorded_ones[qwen3_moe]"
    assert one == parallel.scope(recorded) == "parity of qwen3_moe"
    variant = f"{PARITY}::test_the_logits_are_those_of_transformers[qwen3_moe tied-block FP8]"
    assert parallel.scope(variant) == "parity of qwen3_moe tied"
    assert parallel.scope(f"{PARITY}::test_refusals_are_of_forms_that_exist") == PARITY
    assert parallel.scope("tests/plan/test_ops.py::test_x[a-b]") == "tests/plan/test_ops.py"
