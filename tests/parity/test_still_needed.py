"""What rows know of names and configs occurs in what transformers 5 saves."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest

from parity.families import FAMILIES
from parity.family import Family
from parity.forms import FORM_BY_NAME, applies, build
from parity.recorded import saved_config
from parity.reference import reference
from parity.release import release_config
from parity.test_left_out import bare
from parity.test_left_out import saved as config_of
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.row import Row

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

ROWS = TRANSFORMS_BY_MODULE.values()
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


def test_every_row_has_a_family_or_is_listed():
    assert {name(row) for row in ROWS if not families(row)} == WITHOUT_FAMILY


@pytest.mark.parametrize(
    "row", [r for r in ROWS if families(r) and (r.renames or r.splits)], ids=name
)
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


@pytest.mark.parametrize("row", [r for r in ROWS if r.translations and families(r)], ids=name)
def test_every_config_fix_of_a_row_has_something_to_fix(row: Row):
    changed: set[str] = set()
    for family in families(row):
        saved = saved_config(family)
        released = release_config(family.base, reference(family.name).config)
        for config in (saved, released, config_of(bare(family))[1], alike(saved), alike(released)):
            for fix in row.translations:
                text = config.get("text_config")
                section = text if isinstance(text, dict) else config
                before = {key: type(value) for key, value in section.items()}
                try:
                    if fix.apply(config, section):
                        changed.add(fix.why)
                except CompatError:
                    changed.add(fix.why)
                if any(type(section.get(key)) is not kind for key, kind in before.items()):
                    changed.add(fix.why)  # The same values, looked up in another way.
    assert changed == {fix.why for fix in row.translations}


def alike(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with layers of one kind only, listed as Ministral's releases do."""
    config = deepcopy(config)
    text = config.get("text_config")
    section = text if isinstance(text, dict) else config
    layers = section.get("num_hidden_layers") or 1
    section.setdefault("layer_types", ["sliding_attention"] * layers)
    for key in ("layer_types", "hybrid_layer_pattern"):
        if isinstance(kinds := section.get(key), list):
            section[key] = [kinds[-1]] * len(kinds)
    return config
