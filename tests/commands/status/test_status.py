"""``vllm-moe-compat status``: what is installed, what is at work, and what ends it."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import vllm_moe_compat
from support import shim
from support.distributions import distribution
from vllm_moe_compat import versions
from vllm_moe_compat.commands.doctor import surroundings
from vllm_moe_compat.commands.status import command as status
from vllm_moe_compat.errors import SettingError
from vllm_moe_compat.families import registry
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.row import Row, SettingTranslation
from vllm_moe_compat.load.hook_status import PATCHED
from vllm_moe_compat.probes import evidence
from vllm_moe_compat.probes.status import status_of

ROOT = Path(__file__).resolve().parents[3]
OLMOE = "mlx_lm.models.olmoe"


@pytest.fixture(autouse=True)
def afterwards() -> Iterator[None]:
    yield
    vllm_moe_compat.revert()


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    return status.run(parser.parse_args(arguments))


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run("--format", "json", *arguments)
    out, err = capsys.readouterr()
    assert not err
    found: dict[str, Any] = json.loads(out)
    return code, found


def test_a_probed_module_is_active_in_every_form(capsys: pytest.CaptureFixture[str]):
    code, found = as_json(capsys, "--module", "olmoe")
    assert code == 0
    assert found["schema"] == "vllm-moe-compat/status/1"
    assert found["problems"] == []
    (row,) = found["rows"]
    assert (row["module"], row["state"]) == (OLMOE, "active")
    probes = {p["form"]: (p["upstream"]["word"], p["patched"]["word"]) for p in row["probes"]}
    assert probes["release"] == ("right", "right")
    assert probes["block FP8"] == ("refused", "right")
    assert probes["saved config"] == ("wrong", "right")
    assert probes.keys() > {"per-tensor FP8", "combined transposed"}
    entries = {e["id"]: e for e in row["workarounds"]}
    assert {e["state"] for e in entries.values()} == {"needed"}
    assert "per-expert: mlx-lm is right" in entries["other-layouts"]["evidence"]
    for entry in entries.values():
        assert entry["why"]
        assert entry["upstream"]
        assert entry["remove_when"]


def test_quick_calls_nothing_active(capsys: pytest.CaptureFixture[str]):
    code, found = as_json(capsys, "--quick")
    assert code == 0
    assert len(found["rows"]) == len(TRANSFORMS_BY_MODULE)
    assert {r["state"] for r in found["rows"]} <= {"patched", "waiting"}
    assert {e["state"] for r in found["rows"] for e in r["workarounds"]} == {"not probed"}
    assert {p["name"]: p["version"] for p in found["packages"]}["mlx-lm"] == metadata.version(
        "mlx-lm"
    )


def test_who_serves_and_what_stands_against_it_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    text = "def platform():\n    return 'somewhere.Platform'\n"
    entry = "other = other_active:platform"
    distribution(tmp_path, "other-one", "other_active", text, platform_plugins=entry)
    monkeypatch.syspath_prepend(tmp_path)
    for variable in ("VLLM_PLUGINS", "VLLM_MOE_COMPAT_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    code, found = as_json(capsys, "--quick")
    reason = "the platform plugin 'other' of other-one is active"
    assert (code, found["serves"]) == (0, {"server": "other-one", "reason": reason})
    monkeypatch.setenv("VLLM_MOE_COMPAT_BACKEND", "embedded")
    assert run("--quick") == 1
    out = capsys.readouterr().out
    assert "Serves: embedded, since VLLM_MOE_COMPAT_BACKEND=embedded" in out
    assert "set VLLM_PLUGINS=moe_compat,moe_compat_mlx,lora_filesystem_resolver," in out


def test_what_is_not_probed_is_said(capsys: pytest.CaptureFixture[str]):
    code, found = as_json(capsys, "--module", "gemma4_text")
    assert code == 0
    (row,) = found["rows"]
    assert row["state"] != "active"
    assert row["reason"] == "not probed: no checkpoint of this module is recorded"


def test_a_module_that_goes_wrong_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def opposite(config: dict[str, Any], text: dict[str, Any]) -> bool:
        text["norm_topk_prob"] = not text["norm_topk_prob"]
        return True

    row = TRANSFORMS_BY_MODULE[OLMOE]
    wrong = SettingTranslation("norm_topk_prob", "the opposite is right", opposite)
    monkeypatch.setitem(TRANSFORMS_BY_MODULE, OLMOE, replace(row, translations=(wrong,)))
    code, found = as_json(capsys, "--module", "olmoe")
    assert code == 1
    assert found["rows"][0]["state"] == "broken"
    assert found["problems"] == [f"{OLMOE}: broken, {found['rows'][0]['reason']}"]
    assert run("--module", "olmoe") == 1
    assert f"Problem: {OLMOE}: broken, olmoe, release: wrong" in capsys.readouterr().out


def test_an_unpatchable_module_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import mlx_lm.models.olmoe as module

    vllm_moe_compat.revert()
    monkeypatch.setattr(module, "Model", None)
    code, found = as_json(capsys, "--quick", "--module", "olmoe")
    assert code == 1
    assert found["rows"][0]["state"] == "unpatchable"
    assert found["problems"] == [f"{OLMOE}: unpatchable, it has no class named Model"]


def test_a_shim_that_takes_our_place_shows():
    import mlx_lm.models.qwen3_5_moe as module

    vllm_moe_compat.apply()
    ours = module.Model.sanitize
    module.Model.sanitize = lambda self, weights: weights
    try:
        rows = {row.module: row for row in status_of({}).rows}
        assert rows[module.__name__].state == "displaced"
    finally:
        module.Model.sanitize = ours


def test_another_librarys_wrapper_over_ours_spoils_no_form(capsys: pytest.CaptureFixture[str]):
    """The stand-in has blocks of 128 built in; each load puts ours outside."""
    vllm_moe_compat.apply()
    remove = shim.install()
    try:
        code, found = as_json(capsys, "--module", "qwen3_5")
        (row,) = found["rows"]
        assert (row["wrapped_by"], row["over"]) == (shim.__name__, False)
        probes = {(p["family"], p["form"]): p["patched"]["word"] for p in row["probes"]}
        assert probes["qwen3_5", "release"] == "right"
        assert probes["qwen3_5", "block FP8 128"] == "right"
        assert probes["qwen3_5", "block FP8"] == "right"
        assert (code, row["state"]) == (0, "active")
    finally:
        remove()


def test_the_plugin_switched_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_MOE_COMPAT", "0")
    vllm_moe_compat.revert()
    code, found = as_json(capsys, "--module", "olmoe")
    assert code == 0
    (row,) = found["rows"]
    assert row["state"] == "off"
    assert {p["patched"] for p in row["probes"]} == {None}
    assert {p["upstream"]["word"] for p in row["probes"]} == {"right", "wrong", "refused"}


def test_versions_out_of_range_are_problems(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(versions.TESTED, "mlx-lm", ">=0.1,<0.2")
    code, found = as_json(capsys, "--quick")
    assert code == 1
    (problem,) = found["problems"]
    assert problem.startswith(f"mlx-lm {metadata.version('mlx-lm')} is installed, where >=0.1,<0.2")
    assert run("--quick") == 1
    assert "out of range" in capsys.readouterr().out


def test_no_other_version_is_advised_where_vllm_metal_chooses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(versions.TESTED, "mlx-lm", ">=0.1,<0.2")
    (alone,) = (p.problem for p in versions.packages() if p.problem)
    assert "install a version in that range" in alone
    about = tmp_path / "vllm_metal-0.3.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-metal\nVersion: 0.3.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (beside,) = (p.problem for p in versions.packages() if p.problem)
    assert "install" not in beside.replace("is installed", "")
    assert "keep it, since vllm-metal chooses it" in beside
    link = surroundings.packages()
    assert link.state == "warning"
    assert link.remedy.startswith("Keep them, since vllm-metal chooses them")


@pytest.mark.parametrize(
    ("version", "word"),
    [("0.32.0", "tested"), ("0.32.9.dev3", "tested"), ("0.33", "out of range")],
)
def test_a_development_version_is_one_of_its_range(version: str, word: str):
    assert versions.judge(version, ">=0.32,<0.33") == word


def test_the_tested_ranges_are_those_of_the_packaging():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [r.partition(";")[0].strip() for r in project["optional-dependencies"]["mlx"]]
    for name in versions.REQUIRED:
        assert f"{name}{versions.TESTED[name]}" in wanted
    demo = project["optional-dependencies"]["demo"]
    oldest = versions.TESTED["transformers"].partition(",")[0]
    assert f"transformers{oldest},<6" in demo
    for file in ("constraints.txt", "constraints-vllm-metal.txt"):
        pins = (ROOT / "scripts" / file).read_text().splitlines()
        for name in ("mlx", "mlx-lm", "transformers", "vllm"):
            (pin,) = (line.partition("==")[2] for line in pins if line.startswith(f"{name}=="))
            assert versions.judge(pin.partition(";")[0], versions.TESTED[name]) == "tested"


def test_text_names_states_and_what_ends_them(capsys: pytest.CaptureFixture[str]):
    assert run("--module", "jamba") == 0
    out, err = capsys.readouterr()
    assert not err
    assert "jamba   active  fp8, other-layouts, jamba-router, config (not probed)" in out
    assert "ends when JambaSparseMoeBlock takes the softmax first" in out
    assert "\x1b" not in out
    assert "mlx_lm/models/jamba.py, JambaSparseMoeBlock" in out
    assert status_of({}).headline.partition(";")[0] in out


def test_status_with_probes_is_the_same_as_the_command(monkeypatch: pytest.MonkeyPatch):
    row = TRANSFORMS_BY_MODULE[OLMOE]
    monkeypatch.setattr(registry, "TRANSFORMS_BY_MODULE", {OLMOE: row})
    vllm_moe_compat.apply()
    found = vllm_moe_compat.status(probe=True)
    (entry,) = found.rows
    assert entry.state == evidence.ACTIVE
    assert found.headline.endswith("modules: 1 active")
    assert {w.id for w in entry.workarounds} == {w.id for w in row.workarounds}
    assert vllm_moe_compat.status().rows[0].state == PATCHED


def test_a_module_that_there_is_not():
    with pytest.raises(SettingError, match=r"--module is 'olmo', where one of qwen3_5, "):
        run("--module", "olmo")


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    rows: list[Row] = list(TRANSFORMS_BY_MODULE.values())[:2]
    with status._progress(2) as tick:
        for row in rows:
            tick(row)
    assert "probing" in shown.getvalue()


def test_it_is_light_until_it_probes():
    code = (
        "import argparse, sys\n"
        "from vllm_moe_compat.commands.status import command as status\n"
        "p = argparse.ArgumentParser(); status.add_arguments(p)\n"
        "assert not {'numpy', 'rich', 'mlx', 'mlx_lm', 'vllm', 'torch'} & sys.modules.keys()\n"
        "assert status.run(p.parse_args(['--quick'])) == 0\n"
        "assert not {'numpy', 'mlx.core', 'mlx_lm', 'vllm', 'torch'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"modules: {len(TRANSFORMS_BY_MODULE)} waiting for their import" in done.stdout.replace(
        "\n", " "
    )
