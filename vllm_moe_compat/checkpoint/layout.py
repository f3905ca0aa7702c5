"""From names, shapes, dtypes and config to one description of the checkpoint.

``detect`` is pure: the loader, the tools and the tests share it. Tensors that
upstream ignores are set aside first and never looked at again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.checkpoint.config import block_sizes, expert_count
from vllm_moe_compat.checkpoint.experts import ExpertBlock, find_experts
from vllm_moe_compat.checkpoint.extras import DEFAULT_EXTRAS, Extras
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers.fp8 import Fp8Tensors, block_of, find_fp8


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint holds.

    Attributes:
        tensors: everything that is loaded, by name, without the ignored.
        ignored: names that upstream drops (prediction heads, vision towers).
        experts: one entry per MoE layer.
        fp8: the FP8 weights and their scales.
        blocks: rows and columns under one FP8 scale, by the config.
        num_experts: what the config says, or None.
    """

    tensors: Mapping[str, TensorInfo]
    ignored: frozenset[str]
    experts: tuple[ExpertBlock, ...]
    fp8: Fp8Tensors
    blocks: tuple[tuple[int, int], ...]
    num_experts: int | None

    @property
    def words(self) -> str:
        """The layout in a few words, for logs: ``per-expert, block FP8``."""
        forms = Counter(form for block in self.experts for form in block.forms)
        parts = [" and ".join(forms) + " experts" if forms else "dense"]
        if self.fp8:
            parts.append(self.fp8_words)
        else:
            names = [n for b in self.experts for n in b.names()] or list(self.tensors)
            dtypes = Counter(self.tensors[name].dtype for name in names)
            parts.append(dtypes.most_common(1)[0][0] if dtypes else "empty")
        return ", ".join(parts)

    @property
    def fp8_scales(self) -> frozenset[str]:
        """The names of all scales of FP8 weights, of activations and caches too."""
        return frozenset((*self.fp8.pairs.values(), *self.fp8.static))

    @property
    def fp8_words(self) -> str:
        """The FP8 form in words: ``block FP8``, ``per-tensor FP8``, or both."""
        found: set[str] = set()
        for shapes in {form[1::2] for form in self.fp8.forms}:
            block = self.block_of(*shapes)
            if block == shapes[0][-2:] and self.blocks == ():
                found.add("per-tensor")
            elif block is not None and 1 in block:
                found.add("per-channel")
            elif block is not None:
                found.add("block")
        return f"{' and '.join(sorted(found))} FP8".strip()

    def block_of(self, weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
        """Return what one factor of a scale covers; None where the shapes do not fit."""
        return block_of(weight, scale, self.blocks)

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
        LayoutError: a number in the config that is needed means nothing.
    """
    ignored = extras.of(config).select(tensors)
    loaded = {name: info for name, info in tensors.items() if name not in ignored}
    experts = tuple(find_experts(loaded))
    fp8 = find_fp8(loaded)
    return Layout(
        tensors=loaded,
        ignored=ignored,
        experts=experts,
        fp8=fp8,
        blocks=block_sizes(config) if fp8.pairs else (),
        num_experts=expert_count(config) if experts else None,
    )
