"""From names, shapes, dtypes and config to one description of the checkpoint.

``detect`` is pure: the loader, the tools and the tests share it. Tensors that
upstream ignores are set aside first and never looked at again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.layout.config import block_size, expert_count
from vllm_moe_compat.layout.experts import ExpertBlock, find_experts
from vllm_moe_compat.layout.extras import DEFAULT_EXTRAS, Extras
from vllm_moe_compat.layout.headers import TensorInfo
from vllm_moe_compat.layout.quantization import Fp8Tensors, find_fp8


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint holds.

    Attributes:
        tensors: everything that is loaded, by name, without the ignored.
        ignored: names that upstream drops (prediction heads, vision towers).
        experts: one entry per MoE layer.
        fp8: the FP8 weights and their scales.
        block: ``weight_block_size`` of the config, or None.
        num_experts: what the config says, or None.
    """

    tensors: Mapping[str, TensorInfo]
    ignored: frozenset[str]
    experts: tuple[ExpertBlock, ...]
    fp8: Fp8Tensors
    block: tuple[int, int] | None
    num_experts: int | None

    @property
    def words(self) -> str:
        """The layout in a few words, for logs: ``per-expert, block FP8``."""
        forms = Counter(form for block in self.experts for form in block.forms)
        parts = [" and ".join(forms) + " experts" if forms else "dense"]
        if self.fp8.pairs:
            parts.append("block FP8")
        elif self.fp8:
            parts.append("FP8")
        else:
            names = [n for b in self.experts for n in b.names()] or list(self.tensors)
            dtypes = Counter(self.tensors[name].dtype for name in names)
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
        LayoutError: a number in the config that is needed means nothing.
    """
    ignored = extras.select(tensors)
    loaded = {name: info for name, info in tensors.items() if name not in ignored}
    experts = tuple(find_experts(loaded))
    fp8 = find_fp8(loaded)
    return Layout(
        tensors=loaded,
        ignored=ignored,
        experts=experts,
        fp8=fp8,
        block=block_size(config) if fp8.pairs else None,
        num_experts=expert_count(config) if experts else None,
    )
