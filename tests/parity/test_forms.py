"""Checks of the oracle: each form has the properties that its name promises."""

from __future__ import annotations

import pytest
import torch

from parity import experts as ex
from parity.families import FAMILIES, MOE
from parity.family import Family
from parity.forms import FORM_BY_NAME, applies, build
from parity.fp8 import quantize, widen
from parity.reference import GRAIN, four_bits, reference
from parity.release import release_names

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


def test_names_are_unique():
    assert len(FAMILIES) == len({family.name for family in FAMILIES.values()})


@pytest.mark.parametrize("family", MOE, ids=lambda family: family.name)
def test_taking_experts_out_and_putting_them_back_changes_nothing(family: Family):
    names = release_names(family.base, reference(family.name).saved)
    rest, layers = ex.take_experts(family.base, names)
    assert layers
    if family.name in (*ex.COMBINED, "qwen3_vl_moe", "longcat_flash"):
        return  # released otherwise than saved
    for path, layer in layers.items():
        rest |= ex.released(family.name, path, layer)
    assert rest.keys() == names.keys()
    assert all(torch.equal(rest[name], value) for name, value in names.items())


@pytest.mark.parametrize("family", MOE, ids=lambda family: family.name)
def test_no_two_sides_of_an_expert_are_equal(family: Family):
    names = release_names(family.base, reference(family.name).saved)
    for layer in ex.take_experts(family.base, names)[1].values():
        count, inner, hidden = layer.parts["up"].shape
        assert len({count, inner, hidden, 2 * inner}) == 4


@pytest.mark.parametrize(
    "family",
    [f for f in FAMILIES.values() if applies(f, FORM_BY_NAME["block FP8"])],
    ids=lambda family: family.name,
)
def test_block_fp8_has_several_blocks(family: Family):
    tensors = build(family, FORM_BY_NAME["block FP8"]).checkpoint.tensors
    grids = [t.shape for name, t in tensors.items() if name.endswith("_scale_inv")]
    assert any(min(grid[-2:]) > 1 for grid in grids)


@pytest.mark.parametrize("block", [(32, 16), (128, 128), (1, 72), None])
def test_fp8_loses_nothing_and_its_scales_differ(block: tuple[int, int] | None):
    generator = torch.Generator().manual_seed(0)
    matrix = four_bits(torch.randn(3, 104, 72, generator=generator)) * GRAIN / 8
    values, scale = quantize(matrix, block, GRAIN, generator)
    assert values.dtype is torch.float8_e4m3fn
    wide = widen(scale, block or (104, 72), 104, 72)
    assert torch.equal(values.float() * wide, matrix)
    assert block is None or scale.unique().numel() > 1


def test_the_other_grain_shows_rounding_to_bfloat16():
    matrix = reference("qwen3_moe").saved["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float())
    plain = reference("qwen3_moe", grain=1).saved["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(plain, plain.bfloat16().float())


def test_forms_leave_the_reference_as_it_is():
    family = FAMILIES["deepseek_v3"]
    before = {name: value.clone() for name, value in reference(family.name).saved.items()}
    for form in FORM_BY_NAME.values():
        if applies(family, form):
            build(family, form)
    after = reference(family.name).saved
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
