"""The gate of the smoke tests, seen from outside; and the demo checkpoint through it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_moe_compat import demo
from vllm_moe_compat.envs import SMOKE_GOLDEN, SMOKE_MODEL

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FILES = ("tests/smoke/test_mlx_lm.py", "tests/smoke/test_vllm.py")


def run_pytest(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    ours = {SMOKE_MODEL.name, SMOKE_GOLDEN.name}
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *arguments],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_without_the_variable_they_are_deselected_and_it_is_said() -> None:
    result = run_pytest(*FILES)
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, result.stdout
    said = re.search(r"no smoke model: (\d+) smoke tests deselected; (\S+)=", result.stdout)
    assert said, result.stdout
    assert said[2] == "VLLM_MOE_COMPAT_SMOKE_MODEL"
    assert f"{said[1]} deselected in" in result.stdout


@pytest.mark.full
def test_beside_other_tests_in_several_processes_it_is_said_once() -> None:
    others = ("tests/checkpoint/test_names.py", "tests/test_import.py")
    result = run_pytest(*FILES, *others, "-n", "2", "--dist", "loadfile")
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    assert len(re.findall(r"no smoke model: \d+ smoke tests deselected", result.stdout)) == 1


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_path_without_a_checkpoint_fails_and_names_the_variable(
    folder: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    path = tmp_path / folder
    result = run_pytest(FILES[0], "-k", "plan", **{SMOKE_MODEL.name: str(path)})
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert f"{SMOKE_MODEL.name}={path}: no config.json in that folder" in result.stdout


def test_a_bad_golden_file_fails_and_names_the_variable(
    demo_checkpoint: demo.DemoCheckpoint, tmp_path: Path
) -> None:
    file = tmp_path / "golden.json"
    file.write_text('{"prompt": "no text"}')
    result = run_pytest(
        *(FILES[1], "-k", "http_golden"),
        **{SMOKE_MODEL.name: str(demo_checkpoint.path), SMOKE_GOLDEN.name: str(file)},
    )
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert f"{SMOKE_GOLDEN.name}={file}: not a JSON file with prompt, text" in result.stdout


def test_without_a_golden_file_only_the_text_is_left_out(tmp_path: Path) -> None:
    result = run_pytest(*FILES, "--collect-only", "-q", **{SMOKE_MODEL.name: str(tmp_path)})
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    assert "no golden text: 3 smoke tests deselected" in result.stdout
    assert "golden" not in result.stdout.partition("no golden text")[0]
    assert "test_the_load_went_through_a_plan" in result.stdout


def test_a_skip_is_a_failure(tmp_path: Path) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = smoke: opt-in\n")
    (tmp_path / "test_skips.py").write_text(
        "import pytest\n"
        "@pytest.mark.smoke\n"
        "def test_here(): pytest.skip('no device')\n"
        "@pytest.mark.smoke\n"
        "@pytest.mark.skip(reason='never')\n"
        "def test_there(): pass\n"
        "def test_elsewhere(): pytest.skip('not ours')\n"
    )
    result = run_pytest(cwd=tmp_path, **{SMOKE_MODEL.name: str(tmp_path)})
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert "a smoke test may not skip" in result.stdout
    assert "no device" in result.stdout
    assert re.search(r"2 (failed|errors?).*1 skipped|1 failed, 1 skipped, 1 error", result.stdout)


@pytest.mark.serve
@pytest.mark.full
def test_the_demo_checkpoint_passes(demo_checkpoint: demo.DemoCheckpoint) -> None:
    path = demo_checkpoint.path
    result = run_pytest(
        *FILES, **{SMOKE_MODEL.name: str(path), SMOKE_GOLDEN.name: str(path / "golden.json")}
    )
    assert result.returncode == pytest.ExitCode.OK, result.stdout[-6000:]
    assert "deselected" not in result.stdout
    assert "skipped" not in result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed
    assert int(passed[1]) == 12
