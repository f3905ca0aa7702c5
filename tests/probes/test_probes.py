"""What mlx-lm does not do by itself; on the day that it does, a workaround may go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx_lm.utils
import pytest

import vllm_moe_compat
from support.cells import one_in
from support.checkpoints import build as build_checkpoint
from vllm_moe_compat import envs
from vllm_moe_compat.families import workarounds as w
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.row import Row, Workaround
from vllm_moe_compat.load.hook_status import PATCHED
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.probes import evidence, results
from vllm_moe_compat.probes import probe as probing
from vllm_moe_compat.probes.evidence import Examined, examine
from vllm_moe_compat.probes.probe import probe
from vllm_moe_compat.probes.recipes import expand, families, families_of, fold_shapes, values
from vllm_moe_compat.probes.status import status_of
from vllm_moe_compat.probes.variants import FORMS

ROWS = list(TRANSFORMS_BY_MODULE.values())
# Of these modules nothing is recorded.
UNRECORDED = {
    "deepseek_v41": "its FP8 is none of our business: no workarounds",
    "gemma4_text": "part of gemma4, and no release by itself",
    "muse_spark": "its forward pass wants Metal",
    "youtu_llm": "transformers has no class for it",
}
# And nothing that shows these.
UNPROVED = {
    ("qwen3_5_moe", "norm-mark"): "released with linear attention only; qwen3_5 shows it",
    ("jamba", "config"): "releases have the layout that mlx-lm expects; tests/test_configs.py",
    ("longcat_flash_ngram", "config"): "transformers has no class for it",
    ("minimax_m3_vl", "config"): "its saved config has both words; tests/parity/test_left_out.py",
    **{
        (module, "config"): "for layers of one kind only; tests/families/test_layer_types.py"
        for module in ("laguna", "ministral3", "mistral3")
    },
}


def name(row: Row) -> str:
    return row.module.rpartition(".")[2]


RECORDED = [row for row in ROWS if families_of(row.module)]


@pytest.fixture
def applied() -> Iterator[None]:
    vllm_moe_compat.apply()
    yield
    vllm_moe_compat.revert()


@cache
def examined(module: str) -> Examined:
    with vllm_moe_compat.applied():
        return examine(TRANSFORMS_BY_MODULE[module])


def needless(workaround: Workaround, row: Row, words: str) -> str:
    """Return what to do about a workaround that a row does not need any more."""
    users = [other for other in ROWS if workaround.id in {u.id for u in other.workarounds}]
    return (
        f"mlx-lm {mlx_lm.__version__} does without {workaround.id!r} in {row.module}: {words}. "
        f"Take it out of that row; delete it when {workaround.remove_when}, in all of "
        f"{', '.join(map(name, users))}, and run scripts/docs/removal."
    )


def demand(workaround: Workaround, row: Row, found: Examined) -> None:
    """Fail with the lines to delete if upstream gets every proof right."""
    entries = evidence.workarounds(replace(row, workarounds=(workaround,)), found)
    assert entries[0].state != evidence.DORMANT, needless(workaround, row, entries[0].evidence)


@pytest.mark.compat
@pytest.mark.parametrize("row", one_in(2, RECORDED), ids=name)
def test_the_row_still_needs_its_workarounds(row: Row):
    for workaround in row.workarounds:
        demand(workaround, row, examined(row.module))


@pytest.mark.parametrize("row", one_in(2, RECORDED), ids=name)
def test_every_probe_through_the_patched_class_is_right(row: Row):
    found = examined(row.module)
    assert found.probes
    for made in found.probes:
        assert made.patched is not None
        assert made.patched.word == results.RIGHT, made


@pytest.mark.parametrize("row", one_in(2, RECORDED), ids=name)
def test_every_workaround_is_proved_or_listed(row: Row):
    entries = evidence.workarounds(row, examined(row.module))
    unproved = {(name(row), e.id) for e in entries if e.state == evidence.NOT_PROBED}
    assert unproved == {key for key in UNPROVED if key[0] == name(row)}


def test_every_row_is_recorded_or_listed():
    assert {name(row) for row in ROWS if row not in RECORDED} == UNRECORDED.keys()


def test_every_workaround_is_in_use_and_its_proofs_are_forms():
    used = {workaround for row in ROWS for workaround in row.workarounds}
    assert used == {found for found in vars(w).values() if isinstance(found, Workaround)}
    for workaround in used:
        assert workaround.proofs
        assert set(workaround.proofs) <= FORMS.keys()
        assert set(workaround.families) <= families().keys()


def test_a_needless_workaround_fails_and_says_when_to_delete_it():
    jamba = TRANSFORMS_BY_MODULE["mlx_lm.models.jamba"]
    olmoe = TRANSFORMS_BY_MODULE["mlx_lm.models.olmoe"]
    needless_here = replace(w.JAMBA_ROUTER, proofs=("release",))
    with pytest.raises(AssertionError) as caught:
        demand(needless_here, olmoe, examined(olmoe.module))
    text = str(caught.value)
    assert "does without 'jamba-router' in mlx_lm.models.olmoe: release: mlx-lm is right" in text
    assert "when JambaSparseMoeBlock takes the softmax first, in all of jamba," in text
    demand(w.JAMBA_ROUTER, jamba, examined(jamba.module))


def test_probing_leaves_the_process_alone(
    applied: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(envs.QUANTIZE.name, "4bit")
    monkeypatch.setenv(envs.DTYPE.name, "bfloat16")
    monkeypatch.setenv(envs.EXPERT_CACHE.name, "1%")
    row = TRANSFORMS_BY_MODULE["mlx_lm.models.olmoe"]
    before = last_report()
    caplog.clear()
    made = probe(families()["olmoe"], row, "block FP8", patched=True)
    assert made is not None
    assert made.patched == results.Verdict(results.RIGHT, distance=made.patched.distance)
    assert made.upstream.word == results.REFUSED
    assert "Received" in made.upstream.why
    assert last_report() is before
    assert not caplog.records
    model = sys.modules[row.module].Model
    assert model.sanitize.__wrapped__.__module__ == row.module
    states = {r.module: r.state for r in vllm_moe_compat.status().rows}
    assert states[row.module] == PATCHED


def test_a_load_in_another_thread_during_a_probe_keeps_its_report(applied: None, tmp_path: Path):
    path = build_checkpoint().write(tmp_path)
    with probing._isolated():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(mlx_lm.utils.load_model, path, lazy=True).result()
        mlx_lm.utils.load_model(build_checkpoint().write(tmp_path / "probed"), lazy=True)
    report = last_report()
    assert report is not None
    assert report.path == str(path)


def test_a_probe_that_the_patched_class_gets_wrong_breaks_the_row(
    applied: None, monkeypatch: pytest.MonkeyPatch
):
    """A row that claims that upstream stacks what it does not."""
    module = "mlx_lm.models.olmoe"
    row = TRANSFORMS_BY_MODULE[module]
    assert row.moe is not None
    wrong = replace(row, moe=replace(row.moe, spelling=(*row.moe.spelling, "w1", "w3", "w2")))
    monkeypatch.setitem(TRANSFORMS_BY_MODULE, module, wrong)
    found = status_of({module: examine(wrong)})
    entry = next(r for r in found.rows if r.module == module)
    assert entry.state == evidence.BROKEN
    assert "per-expert w1/w2/w3: refused (ValueError" in entry.reason
    assert any(module in problem for problem in found.problems)


def test_a_row_that_upstream_gets_right_is_dormant(applied: None):
    """Upstream takes OLMoE's release, so a row that served it alone would be dormant."""
    row = TRANSFORMS_BY_MODULE["mlx_lm.models.olmoe"]
    alone = replace(row, workarounds=(replace(w.OTHER_LAYOUTS, proofs=("per-expert",)),))
    found = examine(alone)
    entries = evidence.workarounds(alone, found)
    assert entries[0].state == evidence.DORMANT
    assert entries[0].evidence == "per-expert: mlx-lm is right"
    assert evidence.state_of(found, entries) == (evidence.DORMANT, "")


def test_what_is_not_in_time_is_not_probed():
    rows = RECORDED[:3]
    found = evidence.examine_all(rows, seconds=-1.0)
    assert {f.reason for f in found.values()} == {evidence.NO_TIME}
    entries = evidence.workarounds(rows[0], found[rows[0].module])
    assert {e.state for e in entries} == {evidence.NOT_PROBED}
    assert {e.evidence for e in entries} - {"only qwen3_5 softmax shows it"} == {evidence.NO_TIME}


def test_names_are_folded_and_unfolded():
    names = {f"a.{layer}.b.{e}.c": (2, 3) for layer in range(2) for e in range(4)}
    names |= {"a.0.d": (1,), "a.2.d": (1,), "e": ()}
    folded = fold_shapes(names)
    assert folded == {"a.{0..1}.b.{0..3}.c": [2, 3], "a.0.d": [1], "a.2.d": [1], "e": []}
    assert expand(folded) == names


def test_values_are_the_same_everywhere():
    """Recorded logits are the answer to these; numpy promises PCG64's raw numbers."""
    assert values(7, "x.weight", (2, 3)).tolist() == [
        [0.6875, 0.8125, -0.0390625],
        [-0.0390625, -0.40625, -0.375],
    ]
    assert values(7, "x.norm.weight", (2,)).tolist() == [0.54296875, 0.58203125]
