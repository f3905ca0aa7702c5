"""The generated pages say what the sources say."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parity.families import FAMILIES
from parity.forms import FORMS, applies
from parity.refused import REFUSED

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts" / "docs"
AGAIN = "run scripts/docs/supported-checkpoints --record"


PAGES = ("supported_checkpoints", "removal", "environment", "settings")


def script(name: str) -> Any:
    """Return a script's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return importlib.import_module(f"_{name}")


@pytest.fixture(scope="module")
def page() -> Any:
    return script("supported_checkpoints")


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_script_renders(name: str):
    page = script(name)
    assert page.PAGE.read_text() == page.render(), f"run {page.COMMAND}"


@pytest.mark.parametrize("name", PAGES)
def test_a_stale_page_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = script(name)
    stale = tmp_path / page.PAGE.name
    stale.write_text(page.render() + "more\n")
    monkeypatch.setattr(page, "PAGE", stale)
    monkeypatch.setattr(sys, "argv", [page.COMMAND, "--check"])
    with pytest.raises(SystemExit, match=f"is stale: run {page.COMMAND}"):
        page.main()
    assert stale.read_text().endswith("more\n")


@pytest.mark.parametrize("name", PAGES)
def test_the_check_passes_from_a_shell(name: str):
    command = [sys.executable, str(SCRIPTS / f"_{name}.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.access(SCRIPTS / name.replace("_", "-"), os.X_OK)


def test_every_cell_of_the_parity_tests_is_recorded(page: Any):
    found = page.recording.read()
    assert found["forms"] == [form.name for form in FORMS] == list(page.FORMS), AGAIN
    recorded = {(n, form) for n, entry in found["families"].items() for form in entry["cells"]}
    cells = {(n, form.name) for n, f in FAMILIES.items() for form in FORMS if applies(f, form)}
    assert recorded == cells, AGAIN
    assert list(found["families"]) == list(FAMILIES), AGAIN
    for name, entry in found["families"].items():
        family = FAMILIES[name]
        own = (entry["module"], entry["class"], entry["note"])
        assert own == (family.module, family.classes[1], family.note), AGAIN


def test_the_recorded_refusals_are_the_listed_ones(page: Any):
    refused = {}
    for name, entry in page.recording.read()["families"].items():
        for form, (plugin, stock) in entry["cells"].items():
            word, _, reason = stock.partition(": ")
            assert word in ("right", "wrong", "fails") or reason in page.REASONS
            if plugin != "right":
                refused[name, form] = plugin
    assert refused.keys() == REFUSED.keys(), AGAIN
    for cell, words in refused.items():
        assert words.startswith("refused: "), cell
        assert REFUSED[cell] in words, AGAIN


@pytest.mark.compat
def test_the_modules_without_a_row_are_mlx_lms(page: Any):
    assert page.recording.read()["unmapped"] == page.recording.unmapped(), AGAIN
