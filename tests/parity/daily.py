"""The daily choice of cells of the parity matrix; the full lane compares all cells.

A plan depends on the row and on the stored form. Rows that differ only in their module's
name or in settings of config.json share a *shape*, and get the same plan for the same
form. So a daily run has

- every family and variant as it is released and as transformers saves it, since its
  settings are its own, and
- every other form once per shape, with the first family of that shape; of packed integers,
  whose plans differ in little else than FP8's, one form for every shape and all forms for
  the families of ``PACKED``.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields

from parity.family import Family
from parity.forms import CELLS, Form
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.row import Row

OF_EVERY_FAMILY = ("release", "saved")
PACKED = ("qwen3_5_moe", "granitemoe", "deepseek_v3", "llama")
# Fields of a row that name it, document it, or are about config.json, serving, or what precedes a
# plan: names and output heads, which tests/load tries in every family.
_NO_PART_OF_A_SHAPE = {
    "module",
    "model_types",
    "text_types",
    "workarounds",
    "translations",
    "cache",
    "fixes",
    "roots",
    "head",
    "embedding",
    "aliases",
    "defaults",
    "limits",
}


def shape(row: Row | None) -> Hashable:
    """Return the fields that a plan depends on; None stands for a module without a row."""
    if row is None:
        return None
    names = (field.name for field in fields(row) if field.name not in _NO_PART_OF_A_SHAPE)
    return tuple((name, repr(getattr(row, name))) for name in names)


def shape_of(family: Family) -> Hashable:
    return shape(TRANSFORMS_BY_MODULE.get(f"mlx_lm.models.{family.module}"))


def in_every_shape(form: Form) -> bool:
    """Whether the form is tried in every shape, not for some families only."""
    return form.packed is None or form.name == "int4"


def choose() -> list[tuple[Family, Form]]:
    """Return the daily cells, in the order of the matrix."""
    chosen, seen = [], set()
    for family, form in CELLS:
        key = (shape_of(family), form.name)
        first = key not in seen if in_every_shape(form) else family.name in PACKED
        if form.name in OF_EVERY_FAMILY or first:
            chosen.append((family, form))
        seen.add(key)
    return chosen


DAILY = frozenset((family.name, form.name) for family, form in choose())
