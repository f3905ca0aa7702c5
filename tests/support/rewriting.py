"""Layouts to write, as tests say them."""

from __future__ import annotations

from vllm_moe_compat.checkpoint.numbers.fp8_ops import WrittenFp8
from vllm_moe_compat.families.row import PER_EXPERT
from vllm_moe_compat.rewrite.written_layout import WrittenLayout


def layout_to(
    experts: str = PER_EXPERT,
    spelling: tuple[str, ...] = (),
    block: tuple[int, int] | None = None,
    e8m0: bool = False,
    home: str = "",
) -> WrittenLayout:
    """A layout in floats, or in FP8 with that block."""
    numbers = None if block is None else WrittenFp8(block, e8m0)
    return WrittenLayout(experts, spelling, numbers, home)
