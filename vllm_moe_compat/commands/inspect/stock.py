"""Predict what mlx-lm does with a checkpoint without this package, from the registry.

A row says which forms the module's ``sanitize`` reads; everything else that the plan does is
missing without it. If the module then has no parameter for a tensor, its strict load refuses.
If a setting is not read or a fix is missing, it loads and computes something else, or
refuses; only the module's code tells which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.commands.inspect.describe import dropped_by_us
from vllm_moe_compat.commands.inspect.model import Stock
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.ops import Add
from vllm_moe_compat.plan.planner import Plan, rename
from vllm_moe_compat.plan.quantization import weights_that_stay
from vllm_moe_compat.plan.upstream import digests_block, digests_numbers, keeps_numbers

LOADS, REFUSES, WRONG, EITHER = "loads", "refuses", "wrong", "refuses or wrong"
UNSURE, UNKNOWN = "unsure", "unknown"


def stock(
    plan: Plan,
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    put_in: Sequence[str],
    changed: Sequence[str],
    *,
    known: bool,
    extern: Any = None,
) -> Stock:
    """Return the prediction.

    Args:
        plan: the plan of the load with this package.
        layout: the checkpoint's layout.
        row: the module's row.
        config: the config as it was read.
        put_in: settings that are put into the forward pass, in words.
        changed: ids of the translations that were applied to the config.
        known: whether mlx-lm has a module for the model type as it was read.
        extern: the content of its hf_quant_config.json, if it has one.
    """
    if not known:
        kind = config.get("model_type")
        return Stock(REFUSES, [f"mlx-lm has no module of the name {kind!r}"])
    refusals, doubts, wrongs = _quantization(config, layout, row, extern), [], []
    misread = _misread(config, layout)
    unexpected = set() if misread else _unexpected(plan, layout, row)
    if unexpected:
        refusals.append(
            f"{len(unexpected):,} tensors have no parameter in its module, or are in a form that "
            "its sanitize does not expect"
        )
    names = plan.names
    if names.renamed:
        refusals.append(f"{len(names.renamed):,} tensors have names that its module does not know")
    if names.copies:
        doubts.append("it does not take the one of head and embeddings that is stored for both")
    hints = []
    if names.drops:
        hints.append("its sanitize may drop an output head beside tied embeddings, or refuse it")
    if settings := [id for id in changed if id != "model_type"]:
        hints.append(
            "config.json has keys that it does not read, so it may refuse, or use other defaults: "
            f"{', '.join(settings)}"
        )
    doubts += [f"it refuses, or computes without, {words}" for words in put_in]
    knows = row.digests or row.keeps or row.misreads
    foreign = keeps_numbers(row, layout) or digests_numbers(row, layout)
    if layout.numbers.weights and knows and not foreign:
        doubts.append("its sanitize reads stored numbers, but not in this form")
    if any(isinstance(op, Add) for build in plan.builds for op in build.ops):
        wrongs.append("it does not add 1 to norms that are stored less 1")
    wrongs += misread
    _add_symptoms(layout, row, config, refusals, wrongs)
    reasons = [*refusals, *doubts, *wrongs, *hints]
    if doubts:
        return Stock(EITHER, reasons, len(unexpected))
    if refusals:
        return Stock(REFUSES, reasons, len(unexpected))
    if wrongs:
        return Stock(EITHER if hints else WRONG, reasons)
    if hints:
        return Stock(UNSURE, reasons)
    return Stock(LOADS, ["its module reads every tensor and every setting"])


def _unexpected(plan: Plan, layout: Layout, row: Row) -> set[str]:
    """Return the tensors that the module's own ``sanitize`` cannot place."""
    if keeps_numbers(row, layout):
        return set()
    found = set(dropped_by_us(plan, layout))
    if layout.numbers.weights and not digests_numbers(row, layout):
        found |= layout.numbers.parts
    elif not layout.numbers.weights:
        found |= set(layout.numbers.unused_scales)
    for block in layout.experts:
        ours = block.per_expert or (block.combined and not block.packed)
        if row.moe is not None and ours and not digests_block(row.moe, block, layout):
            found |= set(block.names())
    for name in layout.tensors if row.renames or row.splits or row.latent else ():
        split = any(name.endswith(end) for end, _ in row.splits)
        latent = row.latent and name.endswith(".kv_b_proj.weight")
        if split or latent or rename(row, name) != name:
            found.add(name)
    return found


def _misread(config: Mapping[str, Any], layout: Layout) -> list[str]:
    """Return what ``load_model`` does wrong with a form that it reads."""
    forms = [found.form for found in layout.numbers.found]
    methods = [entry.get("quant_method") for entry in quantization_configs(config)]
    if layout.experts or [form.name for form in forms] != methods[:1]:
        return []
    if len(weights_that_stay(layout)) < len(layout.numbers.weights):
        return []  # It knows MLX's groups only.
    return [form.misread_upstream for form in forms if form.misread_upstream]


def _quantization(config: Mapping[str, Any], layout: Layout, row: Row, extern: Any) -> list[str]:
    """Say whether ``load_model`` refuses the ``quantization_config``."""
    if config.get("quantization") is not None or not layout.numbers.weights:
        return []
    entry = next(iter(quantization_configs(config)), None)
    if entry is None and isinstance(extern, dict):
        return ["hf_quant_config.json names FP8, and of ModelOpt's it takes only NVFP4"]
    method = entry.get("quant_method") if entry is not None else None
    accepted = ("NVFP4", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "pack-quantized")
    says = {entry.get("format"), entry.get("quant_algo")} if entry is not None else set()
    if method in ("compressed-tensors", "modelopt") and says.isdisjoint(accepted):
        return [f"quant_method {method} is taken for packed 4-bit formats only"]
    return []


def _add_symptoms(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    refusals: list[str],
    wrongs: list[str],
) -> None:
    """Add the effects of missing workarounds that the plan does not show."""
    for workaround in row.workarounds:
        symptom = workaround.symptom
        if symptom is not None and symptom.occurs(layout, config):
            (refusals if symptom.refuses else wrongs).append(workaround.why)
