"""Describe prediction heads: whether they are there, can be used, and what they cost."""

from __future__ import annotations

from vllm_moe_compat.commands.inspect.model import PredictionHeads
from vllm_moe_compat.commands.inspect.problems import clean
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.prediction_heads import find_heads


def describe_heads(planned: PlannedLoad) -> PredictionHeads | None:
    """Describe the heads of a planned load; None if it neither has nor mentions one."""
    found = find_heads(planned)
    if not found.tensors and not found.stated:
        return None
    return PredictionHeads(
        stated=found.stated,
        tensors=len(found.tensors),
        bytes=found.stored_bytes,
        weights=None if found.view is None else found.weight_bytes,
        refused=[clean(fault.message) for fault in found.faults],
    )
