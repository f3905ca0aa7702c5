"""In which form the routed experts lie, found in one pass over the names.

Three forms are in use. *Per-expert*: ``….experts.{e}.{projection}.weight``, one
matrix each. *Combined*: ``….experts.gate_up_proj`` ``[E, 2I, H]`` and
``….experts.down_proj`` ``[E, H, I]``. *Stacked*, MLX's own: ``….switch_mlp.…``,
``[E, O, I]`` per projection. A model has one ``ExpertBlock`` per MoE layer.

Indices are collected as they are, never counted up to the first gap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

SCALE_SUFFIX = "_scale_inv"
STATIC_SCALES = ("activation_scale", "input_scale")
_INDEX = re.compile("0|[1-9][0-9]{0,8}")
_SCALES = (SCALE_SUFFIX, *STATIC_SCALES)
_COMBINED = ("gate_up_proj", "down_proj")


@dataclass(slots=True)
class ExpertBlock:
    """The routed experts of one MoE layer.

    Attributes:
        parent: what stands before ``.experts``: ``model.layers.0.mlp``.
        per_expert: projection → expert index → name of its weight.
        combined: ``gate_up_proj`` and ``down_proj`` → name.
        stacked: names in MLX form.
        other: names under ``.experts`` that are in none of the three forms.
    """

    parent: str
    per_expert: dict[str, dict[int, str]] = field(default_factory=dict)
    combined: dict[str, str] = field(default_factory=dict)
    stacked: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms found here, in words; more than one is a contradiction."""
        found = {
            "per-expert": self.per_expert,
            "combined": self.combined,
            "MLX form": self.stacked,
        }
        return tuple(word for word, names in found.items() if names)

    def names(self) -> list[str]:
        """Return the weights of the block, in whichever form."""
        return [
            *(name for experts in self.per_expert.values() for name in experts.values()),
            *self.combined.values(),
            *self.stacked,
            *self.other,
        ]


def find_experts(names: Iterable[str]) -> list[ExpertBlock]:
    """Sort the names of routed experts into blocks, in the order of the names.

    Scales belong to their weights and are left to ``quantization``.
    """
    blocks: dict[str, ExpertBlock] = {}
    for name in names:
        if ".experts." in name:
            parent, _, rest = name.partition(".experts.")
        elif ".switch_mlp." in name:
            parent, _, rest = name.partition(".switch_mlp.")
        else:
            continue
        block = blocks.get(parent)
        if block is None:
            block = blocks[parent] = ExpertBlock(parent)
        _sort_in(block, name, rest)
    return [block for block in blocks.values() if block.forms or block.other]


def _sort_in(block: ExpertBlock, name: str, rest: str) -> None:
    if ".switch_mlp." in name or ".experts.switch_glu." in name:
        block.stacked.append(name)
        return
    if rest.endswith(_SCALES):
        return
    if rest in _COMBINED:
        block.combined[rest] = name
        return
    index, _, path = rest.partition(".")
    if _INDEX.fullmatch(index) and path.endswith(".weight"):
        projection = path.removesuffix(".weight")
        block.per_expert.setdefault(projection, {})[int(index)] = name
    else:
        block.other.append(name)
