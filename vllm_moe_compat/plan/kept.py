"""Build experts whose packed bytes the module keeps as they are.

gpt-oss releases MXFP4 in blocks, MiniMax M3 E4M3 bytes with an exponent per 32 columns. Both are
MLX's own words once the bytes are read as ``uint32``, which the modules' ``sanitize`` does for all
experts together. For one expert, or the share of one rank, each tensor needs a build. What the
builds make is what ``sanitize`` makes, and ``sanitize`` passes it through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_moe_compat.checkpoint.experts import PROJECTIONS, ExpertBlock
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.checkpoint.operations import Op
from vllm_moe_compat.families.row import Moe, Row
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.ops import AsWords, SplitGateUp, StackExperts

_BLOCKS, _SCALES = "_blocks", "_scales"


def kept_blocks(layout: Layout, row: Row) -> Iterator[Build]:
    """Yield the builds of experts in MXFP4 blocks.

    ``gate_up_proj_blocks`` is U8 ``[E, 2I, H/32, 16]``, ``gate_up_proj_scales`` U8
    ``[E, 2I, H/32]``, ``gate_up_proj_bias`` ``[E, 2I]``; rows of gate and up may alternate.
    """
    if row.moe is None or "mxfp4 blocks" not in row.keeps:
        return
    for block in layout.experts:
        if not any(name.endswith(_BLOCKS) for name in block.packed):
            continue
        root = _root(row.moe, block)
        for name in block.packed:
            path = name.removeprefix(f"{block.path}.")
            if path.endswith(_BLOCKS):
                part = PROJECTIONS[path.removesuffix(_BLOCKS)]
                yield _build(row.moe, root, part, "weight", name, (AsWords(grouped=True),))
            elif path.endswith(_SCALES):
                part = PROJECTIONS[path.removesuffix(_SCALES)]
                yield _build(row.moe, root, part, "scales", name, ())
        for part, name in block.combined.items():
            yield _build(row.moe, root, part.removesuffix(".bias"), "bias", name, ())


def _build(moe: Moe, root: str, part: str, kind: str, source: str, ops: tuple[Op, ...]) -> Build:
    names = dict(moe.projections)
    if part != "gate_up":
        return Build(f"{root}.{names[part]}.{kind}", (source,), (), ops)
    split = SplitGateUp(moe.interleaved, -1 if kind == "bias" else -2)
    gate, up = (f"{root}.{names[one]}.{kind}" for one in ("gate", "up"))
    return Build(gate, (source,), (), (*ops, split), (up,))


def kept_numbers(layout: Layout, row: Row) -> Iterator[Build]:
    """Yield the builds of per-expert E4M3 with exponents per 32 columns, words and scales apart."""
    if row.moe is None or "fp8 mx" not in row.keeps:
        return
    numbers = layout.numbers
    for block in layout.experts:
        root = _root(row.moe, block)
        for part, names in block.per_expert.items():
            each = [numbers.stored(names[e]) for e in sorted(names)]
            if not all(len(one.parts) == 1 for one in each):
                continue  # Floats, which sanitize stacks.
            target, stack = f"{root}.{dict(row.moe.projections)[part]}", StackExperts(len(each))
            words = tuple(one.tensor for one in each)
            yield Build(f"{target}.weight", words, (), (stack, AsWords()))
            scales = tuple(one.parts[0][1] for one in each)
            yield Build(f"{target}.scales", scales, (), (stack,))


def together(builds: Iterable[Build], layout: Layout) -> str:
    """Return packed experts that only ``sanitize`` makes, for all experts of a layer together.

    Args:
        builds: of a complete plan.
        layout: the checkpoint's layout.

    Returns:
        Their names, for messages; empty if every expert has builds of its own.
    """
    packed = {n for block in layout.experts for n in (*block.packed, *block.names())}
    packed &= {*layout.numbers.tensors, *(n for n in packed if n.endswith((_BLOCKS, _SCALES)))}
    left = [b.target for b in builds if not b.ops and b.target in packed]
    return fold(left) if left else ""


def _root(moe: Moe, block: ExpertBlock) -> str:
    """Return the path of the block's experts in the module."""
    source = moe.source_of(block.path) or ""
    return block.path.removesuffix(source) + moe.target
