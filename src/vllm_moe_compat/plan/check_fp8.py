"""Whether every FP8 weight has a scale that fits it.

A weight read without its scale gives small integers, with a wrong grid plausible
nonsense; both would load. Where the config names no block, the usual 128x128 is
taken if every grid fits it, and refused otherwise: a grid does not tell its block
(192 rows with 2 scales may be blocks of 96 or of 128).
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.layout import Layout, TensorInfo
from vllm_moe_compat.plan.findings import CONVERT, Finding
from vllm_moe_compat.plan.ops import scale_grid

DEFAULT_BLOCK = (128, 128)
SCALE_DTYPES = ("BF16", "F16", "F32")


def check_fp8(layout: Layout) -> Iterator[Finding]:
    """Yield what is wrong with the checkpoint's FP8 tensors."""
    fp8 = layout.fp8
    for name in fp8.bare:
        yield Finding(
            name, "is FP8 without a scale", f"{name.rpartition('.')[2]}_scale_inv", rank=1
        )
    for name in fp8.orphans:
        yield Finding(name, "scales a weight that is missing", "that weight beside it", rank=1)
    for name in fp8.plain:
        dtype = layout.tensors[name.removesuffix("_scale_inv")].dtype
        yield Finding(name, f"scales a weight that is {dtype}", "an FP8 weight beside it", rank=1)
    for name, scale in fp8.other.items():
        yield _unsupported(
            name, f"is FP8 with {_describe(layout.tensors[scale])} in {scale.rpartition('.')[2]}"
        )
    for name, scale in fp8.pairs.items():
        yield from _pair(layout, name, scale)


def _pair(layout: Layout, name: str, scale_name: str) -> Iterator[Finding]:
    weight, scale = layout.tensors[name], layout.tensors[scale_name]
    if weight.dtype != "F8_E4M3":
        yield _unsupported(name, f"is {weight.dtype}")
        return
    if scale.dtype not in SCALE_DTYPES:
        found = "E8M0" if scale.dtype in ("F8_E8M0", "U8") else scale.dtype
        yield _unsupported(scale_name, f"holds {found} scales")
        return
    if len(weight.shape) < 2:
        yield _unsupported(name, f"is FP8 of shape {list(weight.shape)}")
        return
    grid = scale_grid(weight.shape, layout.block or DEFAULT_BLOCK)
    if scale.shape == grid:
        return
    if scale.shape in ((), (1,)) or _per_channel(weight.shape, scale.shape):
        yield _unsupported(scale_name, f"holds {_describe(scale)}")
        return
    rows, columns = layout.block or DEFAULT_BLOCK
    source = "the config's" if layout.block else "the usual"
    unnamed = "" if layout.block else " and the config has no weight_block_size"
    yield Finding(
        scale_name,
        f"has the shape {list(scale.shape)} for a weight of {list(weight.shape)}{unnamed}",
        f"{list(grid)} for {source} blocks of {rows}x{columns}",
    )


def _per_channel(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    return weight[-2] > 1 and scale in ((*weight[:-1], 1), weight[:-1])


def _describe(scale: TensorInfo) -> str:
    shape = scale.shape
    if shape in ((), (1,)):
        return "one scale per tensor"
    if len(shape) == 1 or shape[-1] == 1:
        return f"one scale per channel {list(shape)}"
    return f"{scale.dtype} scales {list(shape)}"


def _unsupported(name: str, found: str) -> Finding:
    return Finding(
        name,
        found,
        "block FP8 (E4M3 with a bf16, f16 or f32 weight_scale_inv per block)",
        remedy=CONVERT,
        error=UnsupportedCheckpointError,
        rank=1,
    )
