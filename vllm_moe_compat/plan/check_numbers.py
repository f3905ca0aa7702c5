"""Whether every FP8 weight has a scale that fits it.

A weight read without its scale gives small integers, with a wrong grid plausible
nonsense; both would load. Where the config names no block, the usual 128x128 is
taken if every grid fits it, and refused otherwise: a grid does not tell its block
(192 rows with 2 scales may be blocks of 96 or of 128).
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.numbers.fp8 import DEFAULT_BLOCK, E8M0, FLOATS
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.plan.findings import CONVERT, Finding
from vllm_moe_compat.plan.ops import scale_grid


def check_fp8(layout: Layout) -> Iterator[Finding]:
    """Yield what is wrong with the checkpoint's FP8 tensors."""
    fp8 = layout.fp8
    for name in fp8.bare:
        yield Finding(
            name, "is FP8 without a scale", f"{name.rpartition('.')[2]}_scale_inv", rank=1
        )
    for name in fp8.orphans:
        yield Finding(name, "scales a weight that is missing", "that weight beside it", rank=1)
    for name, weight in fp8.plain.items():
        dtype = layout.tensors[weight].dtype
        yield Finding(name, f"scales a weight that is {dtype}", "an FP8 weight beside it", rank=1)
    for names in fp8.forms.values():
        finding = _pair(layout, names[0], fp8.pairs[names[0]])
        if finding is not None:
            about_weight = finding.name == names[0]
            for name in names:
                yield finding.of(name if about_weight else fp8.pairs[name])


def _pair(layout: Layout, name: str, scale_name: str) -> Finding | None:
    weight, scale = layout.tensors[name], layout.tensors[scale_name]
    if weight.dtype != "F8_E4M3":
        return _unsupported(name, f"is {weight.dtype}")
    if scale.dtype not in (*FLOATS, *E8M0):
        return _unsupported(scale_name, f"holds {scale.dtype} scales")
    if len(weight.shape) < 2:
        return _unsupported(name, f"is FP8 of shape {list(weight.shape)}")
    if layout.block_of(weight.shape, scale.shape) is not None:
        return None
    rows, columns = layout.blocks[0] if layout.blocks else DEFAULT_BLOCK
    source = "the config's" if layout.blocks else "the usual"
    unnamed = "" if layout.blocks else " and the config has no weight_block_size"
    return Finding(
        scale_name,
        f"has the shape {list(scale.shape)} for a weight of {list(weight.shape)}{unnamed}",
        f"{list(scale_grid(weight.shape, (rows, columns)))} for {source} blocks of "
        f"{rows}x{columns}",
    )


def _unsupported(name: str, found: str) -> Finding:
    return Finding(
        name,
        found,
        "FP8 of the E4M3 kind with float or E8M0 scales",
        remedy=CONVERT,
        error=UnsupportedCheckpointError,
        rank=1,
    )
