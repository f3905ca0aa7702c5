"""From names, shapes, dtypes and config to one description of the checkpoint.

``detect`` is pure: the loader, the tools and the tests share it. Tensors that upstream
ignores are set aside first and never looked at again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.checkpoint.config import expert_count
from vllm_moe_compat.checkpoint.experts import ExpertBlock, find_experts
from vllm_moe_compat.checkpoint.extras import DEFAULT_EXTRAS, Extras
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers import Numbers, find_numbers


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint holds.

    Attributes:
        tensors: everything that is loaded, by name, without the ignored.
        weights: the same as a float checkpoint would have it: a weight in a stored number
            form under its own name, with the shape of its floats, and none of its parts.
        ignored: names that upstream drops (prediction heads, vision towers).
        experts: one entry per MoE layer.
        numbers: the stored number forms.
        num_experts: routed experts of a layer by the config, or None.
    """

    tensors: Mapping[str, TensorInfo]
    weights: Mapping[str, TensorInfo]
    ignored: frozenset[str]
    experts: tuple[ExpertBlock, ...]
    numbers: Numbers
    num_experts: int | None

    @property
    def words(self) -> str:
        """The layout in a few words, for logs: ``per-expert experts, block FP8``."""
        layouts = Counter(layout for block in self.experts for layout in block.forms)
        parts = [" and ".join(layouts) + " experts" if layouts else "dense"]
        if details := [d for d in self.numbers.details if d.weights]:
            parts += [form.words for form in details]
        else:
            names = [n for b in self.experts for n in b.names()] or list(self.weights)
            dtypes = Counter(self.weights[name].dtype for name in names)
            parts.append(dtypes.most_common(1)[0][0] if dtypes else "empty")
        return ", ".join(parts)

    @property
    def per_expert(self) -> list[str]:
        """The names of all per-expert weights."""
        return [
            name
            for block in self.experts
            for experts in block.per_expert.values()
            for name in experts.values()
        ]


def detect(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    extras: Extras = DEFAULT_EXTRAS,
) -> Layout:
    """Describe the checkpoint that has these tensors and this config.

    Raises:
        LayoutError: a number in the config that is needed is not a valid value.
    """
    ignored = extras.of(config).select(tensors)
    loaded = {name: info for name, info in tensors.items() if name not in ignored}
    numbers = find_numbers(loaded, config)
    weights = _weights(loaded, numbers)
    experts = tuple(find_experts(weights))
    return Layout(
        tensors=loaded,
        weights=weights,
        ignored=ignored,
        experts=experts,
        numbers=numbers,
        num_experts=expert_count(config) if experts else None,
    )


def _weights(tensors: Mapping[str, TensorInfo], numbers: Numbers) -> Mapping[str, TensorInfo]:
    """Return the tensors with every stored weight under its own name, in the same order."""
    if not numbers.found:
        return tensors
    weight_of = {
        stored.tensor: (name, found)
        for found in numbers.found
        for name, stored in found.weights.items()
    }
    parts = numbers.parts
    weights: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name in weight_of:
            weight, found = weight_of[name]
            weights[weight] = found.logical(weight)
        elif name not in parts:
            weights[name] = info
    return weights
