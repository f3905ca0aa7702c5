"""Rows step aside for what a release of mlx-lm is recorded to do by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

import vllm_moe_compat
from vllm_moe_compat import dormancy, envs
from vllm_moe_compat.families import workarounds as w
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.row import Fixed, Row, Workaround
from vllm_moe_compat.load import context
from vllm_moe_compat.load import status as state
from vllm_moe_compat.load.patching import status_of
from vllm_moe_compat.probes.evidence import examine
from vllm_moe_compat.probes.probe import judge
from vllm_moe_compat.probes.recipes import families
from vllm_moe_compat.probes.variants import write

INSTALLED = metadata.version("mlx-lm")
LATER = "99"
Record = Callable[..., Row]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """Say in the registry that a workaround of a row is superfluous since a version."""

    def put(module: str, workaround: Workaround, *fixed: Fixed) -> Row:
        row = TRANSFORMS_BY_MODULE[f"mlx_lm.models.{module}"]
        known = replace(workaround, fixed_in=fixed)
        others = tuple(known if other == workaround else other for other in row.workarounds)
        assert known in others
        changed = replace(row, workarounds=others)
        monkeypatch.setitem(TRANSFORMS_BY_MODULE, row.module, changed)
        return changed

    vllm_moe_compat.apply()
    yield put
    vllm_moe_compat.revert()


def load(row: Row, family: str, form: str, folder: Path) -> str:
    """Return what comes of a load through the hooks, in a word."""
    recipe = write(folder, families()[family], row, form)
    assert recipe is not None
    with context.serving_dtype_as("float32"):
        return judge(folder, recipe).word


def test_a_row_steps_aside_from_the_recorded_version_on(
    record: Record, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """mlx-lm does not do it, so what comes out shows who did."""
    row = record("jamba", w.JAMBA_ROUTER, Fixed("jamba", INSTALLED))
    with caplog.at_level(logging.INFO):
        assert load(row, "jamba", "release", tmp_path) == state.WRONG
    told = [r.getMessage() for r in caplog.records if "left to mlx-lm" in r.getMessage()]
    assert told == [
        f"moe_compat: {tmp_path}: left to mlx-lm {INSTALLED}, which mlx_lm.models.jamba does by "
        f"itself: every form (jamba-router, since {INSTALLED}); VLLM_MOE_COMPAT_FORCE=1 would not "
        "leave it"
    ]
    assert "INFO" in {r.levelname for r in caplog.records}


def test_force_keeps_it(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = record("jamba", w.JAMBA_ROUTER, Fixed("jamba", INSTALLED))
    monkeypatch.setenv(envs.FORCE.name, "1")
    assert load(row, "jamba", "release", tmp_path) == state.RIGHT


@pytest.mark.parametrize("fixed", [Fixed("jamba", LATER), Fixed("olmoe", INSTALLED)])
def test_another_version_or_module_changes_nothing(record: Record, tmp_path: Path, fixed: Fixed):
    row = record("jamba", w.JAMBA_ROUTER, fixed)
    assert dormancy.awake(row) is row
    assert load(row, "jamba", "release", tmp_path) == state.RIGHT


def test_only_the_recorded_form_is_left(record: Record, tmp_path: Path):
    """One layout is upstream's then, the other still ours."""
    row = record("olmoe", w.OTHER_LAYOUTS, Fixed("*", "0.1", (("reads", ("combined",)),)))
    for form, word in (("combined", state.REFUSED), ("combined transposed", state.RIGHT)):
        folder = tmp_path / form
        folder.mkdir()
        assert load(row, "olmoe", form, folder) == word


def test_fp8_that_mlx_lm_has_learnt_is_left_to_it(record: Record, tmp_path: Path):
    row = record("deepseek_v3", w.FP8_FORMS, Fixed("*", INSTALLED))
    assert load(row, "deepseek_v3", "block FP8 128", tmp_path) == state.RIGHT
    report = context.last_report()
    assert report is not None
    assert report.digested
    assert not report.dequantized
    assert not report.layers


@pytest.mark.parametrize(
    "row", [r for r in TRANSFORMS_BY_MODULE.values() if r.workarounds], ids=lambda r: r.module[14:]
)
def test_without_its_workarounds_nothing_of_a_row_is_left(row: Row):
    """Every field that a workaround stands for is named in its ``then``."""
    every = (Fixed("*", "0.1"),)
    gone = replace(
        row, workarounds=tuple(replace(known, fixed_in=every) for known in row.workarounds)
    )
    left = dormancy.awake(gone)
    assert left.workarounds == ()
    assert (left.config, left.renames, left.splits, left.around) == ((), (), (), None)
    assert not left.latent
    assert left.moe is None or "any" in left.moe.reads
    assert {"all", "any"} & {*left.fp8}
    assert left.arithmetic is None or not left.arithmetic.widens


def test_status_says_that_it_is_left(record: Record):
    row = record("jamba", w.JAMBA_ROUTER, Fixed("jamba", INSTALLED))
    found = next(r for r in status_of({}).rows if r.module == row.module)
    entry = next(e for e in found.workarounds if e.id == "jamba-router")
    assert entry.state == state.LEARNT
    assert entry.evidence == f"recorded: mlx-lm {INSTALLED} and later do it"
    assert "    jamba-router: left to mlx-lm" in str(status_of({}))
    # And that the record is wrong, if it is.
    probed = next(r for r in status_of({row.module: examine(row)}).rows if r.module == row.module)
    assert probed.state == state.BROKEN
