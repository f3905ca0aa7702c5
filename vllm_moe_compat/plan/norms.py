"""Norm weights that a release stores minus 1: plan the addition, or leave it to upstream.

Upstream's ``sanitize`` adds 1 if it takes the checkpoint for a release rather than for one that
mlx-lm has saved. It tells by a mark (``NormShift.mark``). A release may lack the mark, and
stacking the experts removes one kind of mark; in both cases the plan adds 1.

If upstream adds, it computes in the checkpoint's dtype. For float32 serving the plan therefore
widens the norms first.
"""

from __future__ import annotations

from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.operations import Op
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.ops import Add, Transpose

_HALF = ("BF16", "F16")


def norms(
    layout: Layout, row: Row, *, stacking: bool, released: bool = False
) -> tuple[list[tuple[str, Op]], tuple[str, ...], bool]:
    """Return the operations on norms, and on the convolutions whose axes mark a release.

    Args:
        layout: the checkpoint's layout.
        row: its module's row.
        stacking: whether the plan stacks the experts.
        released: whether the layout is a part of a release, so that norms are shifted even if
            there is no mark.

    Returns:
        Pairs of tensor and operation; the half-precision tensors to widen because upstream
        computes with them; whether upstream's ``sanitize`` returns early, without dropping
        extra tensors.
    """
    rule = row.norm_shift
    if rule is None:
        return [], (), False
    found = [
        n for n, i in layout.tensors.items() if n.endswith(rule.suffixes) and len(i.shape) == 1
    ]
    convs = [n for n in layout.tensors if n.endswith("conv1d.weight")]
    raw = [n for n in convs if layout.tensors[n].shape[-1:] != (1,)]
    half = tuple(n for n in found if layout.tensors[n].dtype in _HALF)
    published = released or any(n.startswith("model.") for n in found)
    shifts: list[tuple[str, Op]] = [(n, Add(1.0)) for n in found]
    match rule.mark:
        case "conv1d":
            if raw:
                return [], half, False
            # Without a convolution upstream finds no mark, whether the norms are shifted or
            # not; names with the prefix of a release tell.
            return shifts if published and not convs else [], (), False
        case "per-expert":
            if stacking:
                # Stacked experts look to upstream like its own checkpoint, so the plan also
                # moves the axis of convolutions.
                return shifts + [(n, Transpose()) for n in raw], (), True
            if any(b.per_expert for b in layout.experts):
                return [], half, False
            return shifts if released else [], (), False
        case _:
            if stacking or any(".moe." in n for n in layout.tensors):
                return [], half, False
            return shifts if released else [], (), False
