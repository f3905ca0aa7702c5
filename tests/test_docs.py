"""The generated pages say what the sources say."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
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
PACKAGE = "src/vllm_moe_compat"
AGAIN = "run scripts/docs/supported-checkpoints --record"


PAGES = ("supported_checkpoints", "removal", "environment")


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


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the sources."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


LOADS = """
import json, vllm_moe_compat as c
from vllm_moe_compat.patching import status_of
from vllm_moe_compat.registry import TRANSFORMS_BY_MODULE as rows
from vllm_moe_compat.upstream.evidence import examine
c.apply()
found = {}
for name in ("jamba", "olmoe"):
    row = rows[f"mlx_lm.models.{name}"]
    probes = [(p.form, p.upstream.word, p.patched.word) for p in examine(row).probes]
    found[name] = [[w.id for w in row.workarounds], probes]
print(json.dumps([c.__file__, found]))
"""


def test_the_worked_example_of_a_removal(copy: Path):
    """What is left is in style, imports and loads; nothing of the workaround is at work."""
    removal = script("removal")
    assert f"--remove {removal.EXAMPLE} --in copy" in removal.PAGE.read_text()
    command = [sys.executable, str(SCRIPTS / "_removal.py"), "--remove", removal.EXAMPLE, "--in"]
    subprocess.run([*command, str(copy)], check=True, capture_output=True)
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--fix", "src"], cwd=copy, check=True, capture_output=True)
    subprocess.run([*ruff, "format", "src"], cwd=copy, check=True, capture_output=True)
    text = "".join(file.read_text() for file in (copy / "src").rglob("*.py"))
    assert "jamba_router" not in text
    assert removal.EXAMPLE not in text
    done = subprocess.run(
        [sys.executable, "-c", LOADS],
        env=os.environ | {"PYTHONPATH": str(copy / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    file, found = json.loads(done.stdout)
    assert file.startswith(str(copy))
    workarounds, probes = found["jamba"]
    assert "jamba-router" not in workarounds
    assert ["release", "wrong", "wrong"] in probes  # as upstream has it
    assert {patched for _, _, patched in found["olmoe"][1]} == {"right"}


def test_every_removal_leaves_sources_that_parse(copy: Path):
    references = script("references")
    registry = copy / PACKAGE / "registry.py"
    for name in references.named():
        assert references.places(name, copy), name
        for file in references.remove(name, copy):
            ast.parse(file.read_text())
        for file in (copy / "src").rglob("*.py"):
            assert not re.search(rf"\bw\.{name}\b", file.read_text()), (name, file)
    assert "around=" not in registry.read_text()


def test_every_line_to_delete_is_where_the_page_says():
    """The lines exist, and hold what the page says."""
    for path, lines, text in re.findall(
        r"^- (\S+\.py):([\d,-]+): `([^`]+)`$", script("removal").PAGE.read_text(), re.M
    ):
        source = (ROOT / path).read_text().splitlines()
        for span in lines.split(","):
            first, last = (int(n) for n in (*span.split("-"), *span.split("-"))[:2])
            found = "\n".join(source[first - 1 : last])
            assert re.split(r"[\s(=]", text.removeprefix("def "))[0] in found, (path, span, text)


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
