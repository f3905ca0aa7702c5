"""The doctor names the first broken link: each is broken for real, in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import Fp8, build
from vllm_moe_compat import demo
from vllm_moe_compat.commands.doctor import child, surroundings
from vllm_moe_compat.commands.doctor.link import Diagnosis, Link

COMMAND = """
import argparse, sys
from vllm_moe_compat.commands.doctor import command as doctor
parser = argparse.ArgumentParser()
doctor.add_arguments(parser)
sys.exit(doctor.run(parser.parse_args(sys.argv[1:])))
"""


def doctor(
    *words: str, shadow: Path | None = None, code: int = 1, **environment: str
) -> dict[str, Any]:
    """Run it; ``shadow`` comes first in the path."""
    env = {**os.environ, **environment}
    path = [str(shadow)] if shadow else []
    env["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--format", "json", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["schema"] == 1
    assert found["healthy"] == (code == 0)
    return found


def states(found: dict[str, Any]) -> dict[str, str]:
    return {link["id"]: link["state"] for link in found["links"]}


def broken(found: dict[str, Any], id: str) -> dict[str, Any]:
    """The link that was named first."""
    assert found["first_broken"] == id
    return next(link for link in found["links"] if link["id"] == id)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint that is refused early, so that nothing heavy runs."""
    path = build(fp8=Fp8()).write(tmp_path / "model")
    (path / "model-00002-of-00002.safetensors").unlink()
    return path


def package(folder: Path, name: str, init: str = "", entry: str = "", version: str = "1") -> Path:
    """A module and its metadata, as an installer leaves them."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(init)
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if entry:
        (about / "entry_points.txt").write_text(entry)
    return folder


@pytest.mark.serve
@pytest.mark.full
def test_a_healthy_chain_from_python_to_the_golden_text(
    demo_checkpoint: demo.DemoCheckpoint, tmp_path: Path
):
    cache = tmp_path / "vllm_moe_compat"
    cache.mkdir()
    (cache / "demo").symlink_to(demo_checkpoint.path)
    found = doctor(code=0, XDG_CACHE_HOME=str(tmp_path))
    assert set(states(found).values()) <= {"ok", "warning"}
    assert "the whole chain works" in found["answer"].lower()
    serve = found["links"][-1]
    assert serve["id"] == "serve"
    assert "MlxPlatform, the golden text" in serve["detail"]


@pytest.mark.full
def test_a_cache_too_small_for_the_demo_is_not_the_users_mistake(
    demo_checkpoint: demo.DemoCheckpoint, tmp_path: Path
):
    cache = tmp_path / "vllm_moe_compat"
    cache.mkdir()
    (cache / "demo").symlink_to(demo_checkpoint.path)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "VLLM_MOE_COMPAT_EXPERT_CACHE": "10%"}
    link = broken(doctor(**environment), "checkpoint")
    assert "VLLM_MOE_COMPAT_EXPERT_CACHE=10%" in link["detail"]
    assert link["remedy"].endswith("25%. Or name a MODEL to check that instead.")


def test_settings_and_plugins_that_hide_us_are_all_named(model: Path):
    found = doctor(str(model), VLLM_MOE_COMPAT="0", VLLM_PLUGINS="moe_compat")
    assert "switches the plugin off" in broken(found, "settings")["detail"]
    hidden = next(link for link in found["links"] if link["id"] == "vllm-plugins")
    assert hidden["state"] == "broken"
    assert "excludes moe_compat_mlx" in hidden["detail"]
    assert "VLLM_PLUGINS=moe_compat,moe_compat_mlx" in hidden["remedy"]
    assert states(found)["mlx"] == "ok"
    assert states(found)["load"] == "skipped"


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("raise ImportError('libmlx.so: cannot open shared object file')", "libmlx.so: cannot"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died with signal SIGSEGV"),
        ("import sys; print('no device'); sys.exit(7)", "exit code 7; its last lines: no device"),
    ],
    ids=["import", "crash", "exit"],
)
def test_an_mlx_that_cannot_be_imported_is_a_finding_and_not_the_end(
    init: str, words: str, tmp_path: Path
):
    found = doctor(shadow=package(tmp_path, "mlx", init, version="0.32.4"))
    assert words in broken(found, "mlx")["detail"]
    assert states(found)["checkpoint"] == "skipped"


@pytest.mark.full
def test_a_second_platform_plugin_and_a_broken_checkpoint_are_named(model: Path, tmp_path: Path):
    entry = "[vllm.platform_plugins]\nother_one = other_one:platform\n"
    init = "def platform():\n    return 'other_one.Platform'\n"
    shadow = package(tmp_path / "path", "other_one", init, entry)
    found = doctor(str(model), shadow=shadow, VLLM_MOE_COMPAT_BACKEND="embedded")
    link = broken(found, "platform")
    assert "other_one, other_one.Platform (of other_one), besides moe_compat_mlx" in link["detail"]
    assert "VLLM_PLUGINS=moe_compat,moe_compat_mlx,lora_" in link["remedy"]
    assert "unset VLLM_MOE_COMPAT_BACKEND for the other" in link["remedy"]
    assert "Platform plugins is the first broken link" in found["answer"]
    link = next(link for link in found["links"] if link["id"] == "checkpoint")
    assert link["state"] == "broken"
    assert "model-00002-of-00002.safetensors" in link["detail"]
    assert "download" in link["remedy"].lower()
    assert {states(found)[id] for id in ("memory", "load", "serve")} == {"skipped"}
    # vLLM would not load what is not named.
    path = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    ours = "moe_compat,moe_compat_mlx"
    asked = child.run("platforms", timeout=100, PYTHONPATH=path, VLLM_PLUGINS=ours)
    assert set(asked.found["found"]) == {"moe_compat_mlx"}
    # Unless ours is asked for, the other one serves.
    asked = child.run("platforms", timeout=100, PYTHONPATH=path)
    assert set(asked.found["found"]) == {"other_one"}
    assert asked.found["serves"][0] == "other_one"


def test_a_version_out_of_range_is_a_warning_that_goes_with_what_is_broken(tmp_path: Path):
    about = tmp_path / "path" / "mlx_lm-0.99.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-lm\nVersion: 0.99\n")
    found = doctor(shadow=about.parent, VLLM_MOE_COMPAT_BACKEND="what")
    assert states(found)["packages"] == "warning"
    assert "is not a valid value" in broken(found, "settings")["detail"]
    assert "mlx-lm is 0.99, where >=0.31.3,<0.33 was tested" in found["answer"]


def test_text_goes_to_a_pipe_whole_and_without_colour(model: Path):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(model)],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "VLLM_MOE_COMPAT_BACKEND": "what", "COLUMNS": "40"},
    )
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok      Python: ")
    assert "broken  Settings: VLLM_MOE_COMPAT_BACKEND='what' is not a valid value" in lines
    assert any("Set it to one of auto, embedded, off" in line for line in lines)


def test_a_folder_without_a_checkpoint_is_a_question_of_usage(tmp_path: Path, capsys):
    from vllm_moe_compat.commands.main import main

    assert main(["doctor", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_step_that_does_not_end_is_ended():
    outcome = child.run("serve", "/nowhere", "{}", timeout=0.2)
    assert outcome.kind == "timeout"
    assert "had not ended after 0 s" in outcome.error


def test_an_intel_python_under_rosetta_is_found(monkeypatch):
    """The host's words are replaced: no machine here has Rosetta."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    answer = subprocess.CompletedProcess([], 0, "1\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    link = surroundings.python()
    assert link.state == "broken"
    assert "Rosetta" in link.detail
    assert "arm64" in link.remedy
    answer.stdout = ""
    assert surroundings.python().state == "ok"


def test_where_vllm_is_not_installed_the_answer_says_what_was_seen():
    links = [
        Link("load", "Load through mlx-lm", "ok", "loaded"),
        Link("vllm", "vLLM", "skipped", "vLLM is not installed"),
        Link("serve", "Serve with vLLM", "skipped", "vLLM is not installed"),
    ]
    found = Diagnosis(links)
    assert found.first_broken is None
    assert found.answer == (
        "The checkpoint loads through mlx-lm and generates; not checked: vLLM, Serve with vLLM, "
        "since vLLM is not installed."
    )
