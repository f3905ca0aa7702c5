"""Every file of the corpus is told, by the finding that it was kept for, and nothing hangs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from support.inspect_files import CORPUS, case_files, write
from vllm_moe_compat.commands.main import main

CASES = sorted(path.stem for path in CORPUS.glob("*.json"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", CASES)
def test_it_is_a_finding(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    case = json.loads((CORPUS / f"{name}.json").read_text())
    folder = write(tmp_path / "checkpoint", case_files(case))
    start = time.perf_counter()
    code = main(["inspect", str(folder), "--format", "json"])
    out, err = capsys.readouterr()
    report = json.loads(out)
    found = {finding["id"]: finding for finding in report["findings"]}
    assert case["finding"] in found, found
    assert found[case["finding"]]["severity"] == "error"
    assert code == case["exit"] == report["exit_code"]
    assert report["verdict"] == "refuses"
    assert err == ""
    assert time.perf_counter() - start < 10
    assert all(len(finding["message"]) < 2000 for finding in report["findings"])


def test_every_class_of_attack_is_there():
    assert len(CASES) > 80
