"""Packed integers of families whose release transformers does not load back.

Their logits are those of the release in floats of the same values, which the other cells compare
with transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, LAYOUTS, _is_linear, applies
from parity.packed import NOT_LOADED, packed_and_plain
from parity.reference import TOKENS
from parity.test_parity import check_held
from support.agreement import planned_loads
from support.loading import load

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
RELEASE = FORM_BY_NAME["release"]
FORMS = ("int4", "GPTQ", "AWQ", "GPTQ act-order")


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def logits(folder: Path) -> np.ndarray:
    model = load(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([TOKENS]))[0])


@pytest.mark.parametrize("name", sorted(n for n in NOT_LOADED if n in FAMILIES))
@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_those_of_the_values(name: str, form: str, tmp_path: Path):
    family, wanted = FAMILIES[name], FORM_BY_NAME[form]
    if not applies(family, RELEASE):
        pytest.fail(f"{name} has no release")
    assert wanted.packed is not None
    layout = LAYOUTS[wanted.layout]
    packed, plain = packed_and_plain(family, wanted.packed, layout, _is_linear)
    with planned_loads() as plans:
        found = logits(packed.write(tmp_path / "packed"))
    check_held(plans)
    expected = logits(plain.write(tmp_path / "plain"))
    assert np.abs(found - expected).max() / np.abs(expected).max() < 2e-5
