"""What mlx-lm does not do by itself; on the day that it does, a workaround may go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.family import Family
from parity.forms import FORM_BY_NAME, Cell, applies, build
from parity.reference import reference
from parity.refused import REFUSED
from parity.release import release_config
from parity.verdict import judge
from support.checkpoints import Checkpoint
from vllm_moe_compat import workarounds as w
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.plan.row import Row, Workaround
from vllm_moe_compat.registry import TRANSFORMS_BY_MODULE

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

ROWS = TRANSFORMS_BY_MODULE.values()
LAYOUTS = ("per-expert", "per-expert w1/w2/w3", "combined", "combined transposed", "in-library")
# Workarounds that many rows share: in these forms the first cell that a row's families
# have, and that mlx-lm does not get right, is the proof.
SHARED: dict[Workaround, tuple[str, ...]] = {
    w.FP8: ("block FP8 128", "block FP8", "per-channel FP8"),
    w.FP8_FORMS: ("per-channel FP8",),
    w.MINISTRAL_FP8: ("per-tensor FP8",),
    w.OTHER_LAYOUTS: LAYOUTS,
    w.NAMES: ("in-library", "saved"),
    w.CONFIG: ("release tensors, saved config",),
}
# Workarounds of one row or two: family and form.
CELLS: dict[Workaround, tuple[tuple[str, str], ...]] = {
    w.STACK_EXPERTS: (("qwen3_5_moe", "per-expert"),),
    w.EARLY_RETURN: (("qwen3_next", "combined"), ("qwen3_next", "block FP8")),
    w.NORM_MARK: (("qwen3_5 softmax", "saved"),),
    w.LAYER_61: (("deepseek_v3 deep", "release"), ("kimi_k25 deep", "release")),
    w.ERNIE_BIAS: (("ernie4_5_moe", "release"),),
    w.JAMBA_ROUTER: (("jamba", "release"),),
    w.HUNYUAN_ROUTER: (("hunyuan_v1_moe", "release"),),
    w.TIED_HEAD: (("qwen3_vl_moe tied", "release"),),
    w.LATENT: (("kimi_vl", "release"),),
    w.GPT_OSS_BF16: (("gpt_oss", "release"),),
}
# These have tests of their own in tests/test_registry.py.
DIRECT = (w.NORM_SHIFT, w.NESTED_VISION)
# mlx-lm's modules for which transformers has no class, or the tests no family.
WITHOUT_FAMILY = {
    "Klear",
    "bailing_hybrid",
    "bailing_moe",
    "bailing_moe_linear",
    "bailing_moe_v3",
    "deepseek",
    "deepseek_v41",
    "gemma4_text",
    "kimi_k3",
    "longcat_flash_ngram",
    "muse_spark",
    "phixtral",
    "youtu_llm",
}


def name(row: Row) -> str:
    return row.module.rpartition(".")[2]


def families(row: Row) -> list[Family]:
    return [family for family in FAMILIES.values() if family.module == name(row)]


@pytest.fixture(autouse=True)
def without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    vllm_moe_compat.revert()
    yield
    vllm_moe_compat.revert()


def test_every_workaround_in_use_is_checked():
    used = {workaround for row in ROWS for workaround in row.workarounds}
    assert {*SHARED, *CELLS, *DIRECT} == used


def test_every_row_has_a_family_or_is_listed():
    assert {name(row) for row in ROWS if not families(row)} == WITHOUT_FAMILY


def cell(family: Family, form: str) -> Cell | None:
    """Return the checkpoint; None where the family does not come in the form."""
    if form != "release tensors, saved config":
        known = FORM_BY_NAME[form]
        return build(family, known) if applies(family, known) else None
    found = build(family, FORM_BY_NAME["release"])
    return replace(found, checkpoint=Checkpoint(found.checkpoint.tensors, saved_config(family)))


def saved_config(family: Family) -> dict[str, Any]:
    """Return what transformers 5 writes; inside of what it has no class for."""
    saved = deepcopy(reference(family.name).config)
    released = release_config(family.base, saved)
    if "text_config" not in released or "text_config" in saved:
        return saved
    return released | {"text_config": saved}


def is_needed(cells: Iterable[tuple[Family, str]], folder: Path) -> bool:
    """Whether mlx-lm gets one of the checkpoints wrong or refuses it."""
    for number, (family, form) in enumerate(cells):
        # What the plugin refuses as well proves nothing.
        skipped = {(family.name, form), (family.name, "saved")} & REFUSED.keys()
        if skipped or (made := cell(family, form)) is None:
            continue
        path = made.write(folder / str(number))
        if judge(path, made.reference, family.tolerance).word != "right":
            return True
    return False


def demand(workaround: Workaround, where: str, needed: bool) -> None:
    rows = ", ".join(name(row) for row in ROWS if workaround in row.workarounds)
    assert needed, (
        f"mlx-lm {mlx_lm.__version__} gets {where} right by itself now, so look into the "
        f"workaround {workaround.id!r}. Rows that use it: {rows}. Once none needs it, delete it "
        "from workarounds.py, registry.py, this file and what it calls in repairs.py or "
        f"configs.py. It may go when {workaround.remove_when}."
    )


@pytest.mark.compat
@pytest.mark.parametrize(
    ("workaround", "row"),
    [
        pytest.param(workaround, row, id=f"{workaround.id}-{name(row)}")
        for workaround in SHARED
        for row in ROWS
        if workaround in row.workarounds and families(row)
    ],
)
def test_the_row_still_needs_the_workaround(workaround: Workaround, row: Row, tmp_path: Path):
    forms = SHARED[workaround]
    cells = ((family, form) for form in forms for family in families(row))
    demand(workaround, f"{name(row)} ({', '.join(forms)})", is_needed(cells, tmp_path))


@pytest.mark.compat
@pytest.mark.parametrize(
    ("workaround", "family", "form"),
    [
        pytest.param(workaround, family, form, id=f"{workaround.id}-{family}-{form}")
        for workaround, cells in CELLS.items()
        for family, form in cells
    ],
)
def test_the_workaround_is_still_needed(
    workaround: Workaround, family: str, form: str, tmp_path: Path
):
    cells = [(FAMILIES[family], form)]
    demand(workaround, f"{family} ({form})", is_needed(cells, tmp_path))


@pytest.mark.parametrize("row", [r for r in ROWS if families(r)], ids=name)
def test_every_name_that_a_row_knows_occurs(row: Row):
    """A pattern that fits nothing is a leftover, or a mistake."""
    names: set[str] = set()
    for family in families(row):
        for form in ("saved", "in-library", "release"):
            if applies(family, FORM_BY_NAME[form]):
                names |= build(family, FORM_BY_NAME[form]).checkpoint.tensors.keys()
    for pattern, _ in row.renames:
        assert any(re.search(pattern, tensor) for tensor in names), pattern
    for end, _ in row.splits:
        assert any(tensor.endswith(end) for tensor in names), end


@pytest.mark.parametrize("row", [r for r in ROWS if r.config and families(r)], ids=name)
def test_every_config_fix_of_a_row_has_something_to_fix(row: Row):
    changed: set[str] = set()
    for family in families(row):
        saved = saved_config(family)
        for config in (saved, release_config(family.base, reference(family.name).config)):
            for fix in row.config:
                text = config.get("text_config")
                try:
                    if fix.apply(config, text if isinstance(text, dict) else config):
                        changed.add(fix.why)
                except CompatError:
                    changed.add(fix.why)
    assert changed == {fix.why for fix in row.config}
