"""Decide which parts of a checkpoint a module's own ``sanitize`` handles."""

from __future__ import annotations

from collections.abc import Collection

from vllm_moe_compat.checkpoint.experts import ExpertBlock, is_transposed
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.families.row import COMBINED, PER_EXPERT, TRANSPOSED, Moe, Row


def digests_block(moe: Moe, block: ExpertBlock, layout: Layout) -> bool:
    """Whether the module's ``sanitize`` stacks these experts, once they are floats."""
    in_release_path = moe.source_of(block.path) == moe.sources[0]
    if not in_release_path or block.packed or not block.spelling <= {*moe.spelling, "gate_up_proj"}:
        return False
    if block.per_expert:
        return PER_EXPERT in moe.stacks and "gate_up" not in block.per_expert
    shapes = [
        layout.weights[block.combined[p]].shape for p in ("gate_up", "down") if p in block.combined
    ]
    if len(shapes) < 2:
        return False
    found = TRANSPOSED if is_transposed(*shapes) else COMBINED
    return found in moe.stacks


def digests_numbers(row: Row, layout: Layout) -> bool:
    """Whether the module's ``sanitize`` dequantises all stored numbers."""
    return _all_kinds(layout, row.digests)


def keeps_numbers(row: Row, layout: Layout) -> bool:
    """Whether the module computes with all stored numbers as they are."""
    return _all_kinds(layout, row.keeps)


def _all_kinds(layout: Layout, known: Collection[str]) -> bool:
    numbers = layout.numbers
    return bool(numbers.weights and known) and all(
        not kinds.isdisjoint(known) for found in numbers.found for kinds in found.kinds()
    )
