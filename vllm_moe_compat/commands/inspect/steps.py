"""Describe a plan: each step, with its numbers of tensors and layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.commands.inspect.describe import dropped_by_us
from vllm_moe_compat.commands.inspect.model import Step
from vllm_moe_compat.commands.inspect.problems import clean
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.ops import (
    Add,
    DequantizeFp8,
    Op,
    SplitGateUp,
    SplitLatent,
    SplitRows,
    StackExperts,
    Transpose,
)
from vllm_moe_compat.plan.planner import Build, Plan

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.\d+(?=\.|$)")


def steps(plan: Plan, layout: Layout, row: Row, changed: Sequence[str]) -> list[Step]:
    """List the steps of a load, in order.

    Args:
        plan: the plan.
        layout: the checkpoint's layout.
        row: the module's row.
        changed: ids of the fixes that were applied to the config.
    """
    found = []
    if changed:
        found.append(Step("put config.json into mlx-lm's words", 0, 0, ", ".join(changed)))
    ours = dropped_by_us(plan, layout)
    theirs = sorted(layout.ignored.difference(ours))
    if static := layout.fp8.static:
        found.append(_step("drop scales of activations and caches", static))
    if ours:
        found.append(_step("drop what the module has no use for", ours))
    groups: dict[str, list[Build]] = {}
    for build in plan.builds:
        groups.setdefault(_action(build, plan), []).append(build)
    for action, builds in groups.items():
        found.append(_step(action, [target for build in builds for target in build.targets]))
    if plan.widen:
        found.append(_step("widen to float32 where float32 serves", plan.widen))
    if row.around is not None:
        doc = (row.around.__doc__ or "").partition("\n")[0].rstrip(".")
        found.append(Step(f"around sanitize: {doc[:1].lower()}{doc[1:]}", 0, 0, ""))
    if plan.digested:
        found.append(Step("leave FP8 to the module's own sanitize", plan.digested, 0, ""))
    if theirs:
        found.append(_step("leave to the module's sanitize, which drops them", theirs))
    return found


def _step(action: str, names: Sequence[str]) -> Step:
    layers = {match[0] for name in names if (match := _LAYER.search(name))}
    return Step(action, len(names), len(layers), clean(fold(names), 240))


def _action(build: Build, plan: Plan) -> str:
    words = [_words(op, build) for op in build.ops]
    if not words:
        words = ["rename"]
    return ", ".join(words)


def _words(op: Op, build: Build) -> str:
    match op:
        case StackExperts():
            return f"stack {op.experts} experts"
        case DequantizeFp8():
            scales = "E8M0 scales" if op.e8m0 else "scales"
            rows, columns = op.block
            if rows == 1 or columns == 1:
                return f"dequantise FP8 with {scales} per channel"
            if (rows, columns) in ((128, 128), (64, 64), (32, 32), (16, 16)):
                return f"dequantise FP8 with {scales} per {rows}x{columns}"
            return f"dequantise FP8 with {scales} per block or tensor"
        case Transpose():
            return "transpose"
        case SplitGateUp():
            return "split gate and up" + (" that take turns" if op.interleaved else "")
        case SplitLatent():
            return "split kv_b_proj into embed_q and unembed_out"
        case SplitRows():
            return f"split into {op.parts}"
        case Add():
            return f"add {op.number:g}"
        case _:
            return type(op).__name__
