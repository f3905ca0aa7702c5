"""Find the tensors of a checkpoint's multi-token-prediction heads by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_moe_compat.checkpoint.config import layer_count
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.families.prediction_heads import PredictionHead
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.planned_load import PlannedLoad


@dataclass(frozen=True, slots=True)
class HeadNames:
    """The names of a checkpoint's heads.

    Attributes:
        layer: beginning of the names in the first head's decoder layer.
        parts: part → name of its module.
        inside: the first head's tensors in the decoder layer.
        apart: part → its tensors.
        strange: tensors of the first head that are neither.
        every: all tensors of all heads.
    """

    layer: str
    parts: Mapping[str, str]
    inside: tuple[str, ...]
    apart: Mapping[str, tuple[str, ...]]
    strange: tuple[str, ...]
    every: tuple[str, ...]


def head_names(
    planned: PlannedLoad, row: Row, facts: PredictionHead, count: int
) -> HeadNames | None:
    """Return the names of the heads; None if there is none."""
    tensors = planned.headers.tensors
    for root in dict.fromkeys(("", *row.roots, "model.", "language_model.")):
        at = {"root": root, "index": 0, "number": count}
        layer, own = facts.layer.format(**at), facts.own.format(**at)
        parts = {part: module.format(**at) for part, module in facts.parts.items()}
        beginnings = (*(f"{module}." for module in parts.values()), layer, *([own] if own else []))
        first = [name for name in tensors if name.startswith(tuple(beginnings))]
        if not first:
            continue
        rest = _further_heads(tensors, root, facts, count)
        first = [name for name in first if name not in rest]
        apart = {
            part: tuple(name for name in first if name.startswith(f"{module}."))
            for part, module in parts.items()
        }
        taken = {name for names in apart.values() for name in names}
        inside = tuple(n for n in first if n.startswith(layer) and n not in taken)
        strange = tuple(n for n in first if n not in taken and not n.startswith(layer))
        return HeadNames(layer, parts, inside, apart, strange, (*first, *sorted(rest)))
    return None


def _further_heads(
    tensors: Mapping[str, TensorInfo], root: str, facts: PredictionHead, count: int
) -> set[str]:
    """Return the names of the heads after the first."""
    found: set[str] = set()
    for index in range(1, 64):
        at = {"root": root, "index": index, "number": count + index}
        begin = tuple(
            text.format(**at)
            for text in (facts.layer, *(f"{module}." for module in facts.parts.values()))
            if "{index}" in text or "{number}" in text
        )
        here = {name for name in tensors if begin and name.startswith(begin)}
        if not here:
            break
        found |= here
    return found


def like_heads(planned: PlannedLoad) -> dict[str, TensorInfo]:
    """Return the tensors that look like those of heads, by names alone."""
    count = layer_count(planned.config)
    roots = () if planned.row is None else planned.row.roots

    def is_head(name: str) -> bool:
        layer = layer_of(name)
        beyond = (
            layer is not None
            and count is not None
            and layer.number >= count
            and layer.prefix.removesuffix("layers.") in roots
        )
        return beyond or "mtp" in name.lower() or "nextn" in name.lower()

    return {name: info for name, info in planned.headers.tensors.items() if is_head(name)}
