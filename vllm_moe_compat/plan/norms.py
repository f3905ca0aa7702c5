"""Norms that a checkpoint stores less 1, and who adds it.

Upstream does, if it takes the checkpoint for one that it has not seen yet. It tells
by a mark that is not always there, or that stacking the experts removes; then the
plan does it. Where upstream does, it computes in the checkpoint's dtype, so float32
serving has the norms widened before.
"""

from __future__ import annotations

from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.operations import Op
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.ops import Add, Transpose

_NARROW = ("BF16", "F16")


def norms(
    layout: Layout, row: Row, *, stacking: bool
) -> tuple[list[tuple[str, Op]], tuple[str, ...], bool]:
    """Say what happens to the norms of this checkpoint.

    Args:
        layout: of the checkpoint.
        row: of its module.
        stacking: whether the plan stacks the experts.

    Returns:
        What the plan does to which tensor; which half-precision tensors upstream will
        compute with; whether upstream does nothing at all beyond.
    """
    rule = row.norm_shift
    if rule is None:
        return [], (), False
    found = [
        n for n, i in layout.tensors.items() if n.endswith(rule.suffixes) and len(i.shape) == 1
    ]
    convs = [n for n in layout.tensors if n.endswith("conv1d.weight")]
    raw = [n for n in convs if layout.tensors[n].shape[-1:] != (1,)]
    narrow = tuple(n for n in found if layout.tensors[n].dtype in _NARROW)
    published = any(n.startswith("model.") for n in found)
    match rule.mark:
        case "conv1d":
            if raw:
                return [], narrow, False
            unmarked = published and not convs
            return [(n, Add(1.0)) for n in found if unmarked], (), False
        case "per-expert":
            if stacking:
                ops: list[tuple[str, Op]] = [(n, Add(1.0)) for n in found]
                return ops + [(n, Transpose()) for n in raw], (), True
            return [], narrow if any(b.per_expert for b in layout.experts) else (), False
        case _:
            raw = [n for n in layout.tensors if ".moe." in n]
            return [], narrow if raw or stacking else (), False
