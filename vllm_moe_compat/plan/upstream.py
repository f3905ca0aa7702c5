"""What a module's own ``sanitize`` handles, so that nothing of ours gets in its way."""

from __future__ import annotations

from vllm_moe_compat.checkpoint.experts import ExpertBlock, is_transposed
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.numbers.fp8 import E8M0, FLOATS
from vllm_moe_compat.families.row import COMBINED, PER_EXPERT, TRANSPOSED, Moe, Row


def digests_block(moe: Moe, block: ExpertBlock, layout: Layout) -> bool:
    """Whether the module stacks these experts by itself, once they are floats."""
    at_home = moe.source_of(block.path) == moe.sources[0]
    if not at_home or block.packed or not block.spelling <= {*moe.spelling, "gate_up_proj"}:
        return False
    if block.per_expert:
        return PER_EXPERT in moe.reads and "gate_up" not in block.per_expert
    shapes = [
        layout.tensors[block.combined[p]].shape for p in ("gate_up", "down") if p in block.combined
    ]
    if len(shapes) < 2:
        return False
    form = TRANSPOSED if is_transposed(*shapes) else COMBINED
    return form in moe.reads


def digests_fp8(row: Row, layout: Layout) -> bool:
    """Whether the module multiplies all of the checkpoint's scales in by itself."""
    if not layout.fp8.pairs or not row.fp8:
        return False
    tensors = layout.tensors
    shapes = {
        (tensors[w].shape, tensors[s].shape, tensors[s].dtype, s.endswith("_scale_inv"))
        for w, s in layout.fp8.pairs.items()
    }

    def takes(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
        if "tensor" in row.fp8 and scale in ((), (*weight[:-2], 1, 1)):
            return True
        square = len(weight) == 2 and layout.block_of(weight, scale) == (128, 128)
        return square and "block" in row.fp8

    return all(
        inverse and dtype in FLOATS and takes(weight, scale)
        for weight, scale, dtype, inverse in shapes
    )


def is_foreign(row: Row, layout: Layout) -> bool:
    """Whether the module keeps this FP8 as it is, packed: none of it is our business."""
    if not layout.fp8.pairs:
        return False
    if "any" in row.fp8:
        return True
    return "mxfp8" in row.fp8 and all(
        layout.tensors[s].dtype in E8M0
        and layout.tensors[s].shape[:-1] == layout.tensors[w].shape[:-1]
        and layout.tensors[w].shape[-1:] == tuple(32 * n for n in layout.tensors[s].shape[-1:])
        for w, s in layout.fp8.pairs.items()
    )
