"""Describe a plan: each step, with its numbers of tensors and layers."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import fold, layer_of
from vllm_moe_compat.commands.inspect.describe import dropped_by_us
from vllm_moe_compat.commands.inspect.model import Step
from vllm_moe_compat.commands.inspect.problems import clean
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.planner import Plan


def steps(
    plan: Plan, layout: Layout, row: Row, changed: Sequence[str], put_in: Sequence[str] = ()
) -> list[Step]:
    """List the steps of a load, in order.

    Args:
        plan: the plan.
        layout: the checkpoint's layout.
        row: the module's row.
        changed: ids of the translations that were applied to the config.
        put_in: settings that are put into the forward pass, in words.
    """
    found = []
    if changed:
        found.append(Step("translate config.json keys for mlx-lm", 0, 0, ", ".join(changed)))
    found += [Step("put into the forward pass", 0, 0, clean(words, 240)) for words in put_in]
    if plan.names.words:
        words = clean("; ".join(plan.names.words), 240)
        found.append(Step("bring names to those of the module", 0, 0, words))
    ours = dropped_by_us(plan, layout)
    theirs = sorted(layout.ignored.difference(ours))
    if static := layout.numbers.unused:
        found.append(_step("drop scales of activations and caches", static))
    if ours:
        found.append(_step("drop what the module has no use for", ours))
    groups: dict[str, list[Build]] = {}
    for build in (b for b in plan.builds if b.ops or b.targets != b.weights):
        groups.setdefault(_action(build), []).append(build)
    for action, builds in groups.items():
        found.append(_step(action, [target for build in builds for target in build.targets]))
    if plan.widen:
        found.append(_step("widen to float32 where float32 serves", plan.widen))
    if row.sanitize_wrapper is not None:
        doc = (row.sanitize_wrapper.__doc__ or "").partition("\n")[0].rstrip(".")
        found.append(Step(f"around sanitize: {doc[:1].lower()}{doc[1:]}", 0, 0, ""))
    if plan.digested:
        found.append(
            Step("leave stored numbers to the module's own sanitize", plan.digested, 0, "")
        )
    if theirs:
        found.append(_step("drop what the module's own sanitize would drop", theirs))
    return found


def _step(action: str, names: Sequence[str]) -> Step:
    layers = {layer.path for name in names if (layer := layer_of(name))}
    return Step(action, len(names), len(layers), clean(fold(names), 240))


def _action(build: Build) -> str:
    if build.held is None:
        return ", ".join(op.words for op in build.ops) or "rename"
    held = f"hold packed as {build.held}"
    return ", ".join(held if op is build.dequantize else op.words for op in build.ops)
