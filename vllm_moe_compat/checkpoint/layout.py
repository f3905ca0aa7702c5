"""Describe a checkpoint by its tensors' names, shapes and dtypes and its config.

``detect`` is a pure function that the loader, the commands and the tests share. Extra tensors,
which the module does not load, are removed first and not checked.
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
    """The content of a checkpoint.

    Attributes:
        tensors: name → tensor that is loaded; extra tensors are left out.
        weights: the tensors of the same checkpoint in floats: a weight in a stored number form
            has its own name and the shape of its floats, and its parts are left out.
        ignored: names of extra tensors (prediction heads, vision towers).
        experts: one entry per MoE layer.
        numbers: the stored number forms.
        num_experts: routed experts per layer by the config, or None.
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
        layouts = Counter(layout for block in self.experts for layout in block.layouts)
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
        LayoutError: a count in the config is not a valid value.
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
    """Return the tensors with every stored weight under its float name, in the same order."""
    if not numbers.found and not numbers.unused:
        return tensors
    float_names = {
        stored.tensor: name
        for found in numbers.found
        for name, stored in found.weights.items()
        if stored.tensor != name
    }
    parts = numbers.parts
    weights: dict[str, TensorInfo] = {}
    for tensor, info in tensors.items():
        if tensor not in parts:
            name = float_names.get(tensor, tensor)
            found = numbers.weights.get(name)
            weights[name] = info if found is None else found.logical(name)
    return weights
