"""Tensors that a checkpoint carries and mlx-lm does not load.

Multi-token-prediction heads and vision towers are dropped by the families' own
``sanitize``. They may hold experts and FP8 weights too, and be incomplete, so
they are set aside before anything else is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.checkpoint.config import expert_count, layer_count
from vllm_moe_compat.checkpoint.names import layer_of

_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")


@dataclass(frozen=True, slots=True)
class Extras:
    """How to know a name that upstream ignores.

    Attributes:
        prefixes: beginnings of names.
        parts: text anywhere in a name.
        beyond_layers: whether decoder layers beyond the config's count are extras: some
            families append their prediction heads as such.
        beyond_experts: whether experts beyond the config's count are: LongCat's router knows
            experts that do nothing, and transformers writes weights for them.
    """

    prefixes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    beyond_layers: bool = False
    beyond_experts: bool = False

    def __or__(self, other: Extras) -> Extras:
        return Extras(
            self.prefixes + other.prefixes,
            self.parts + other.parts,
            self.beyond_layers or other.beyond_layers,
            self.beyond_experts or other.beyond_experts,
        )

    def of(self, config: Mapping[str, Any]) -> Ignored:
        """Return what the extras are in a checkpoint with this config.

        Raises:
            LayoutError: a number in the config that is needed means nothing.
        """
        return Ignored(
            self,
            layers=layer_count(config) if self.beyond_layers else None,
            experts=expert_count(config) if self.beyond_experts else None,
        )


@dataclass(frozen=True, slots=True)
class Ignored:
    """Extras, with the counts of one config.

    Attributes:
        extras: what to look for.
        layers: how many decoder layers there are; None where that does not matter.
        experts: how many routed experts; likewise.
    """

    extras: Extras
    layers: int | None = None
    experts: int | None = None

    def select(self, names: Collection[str]) -> frozenset[str]:
        """Return those of the names that upstream ignores."""
        words = self.extras.parts
        parts = re.compile("|".join(map(re.escape, words))) if words else None
        found = {
            name
            for name in names
            if name.startswith(self.extras.prefixes) or (parts is not None and parts.search(name))
        }
        if self.layers is not None:
            found |= {
                name for name in names if (layer := layer_of(name)) and layer.number >= self.layers
            }
        if self.experts is not None:
            found |= {
                name
                for name in names
                if (match := _EXPERT.search(name)) and int(match[1]) >= self.experts
            }
        return frozenset(found)


DEFAULT_EXTRAS = Extras(
    prefixes=("vision_tower", "model.vision_tower", "model.visual", "visual."),
    parts=("mtp.", ".visual."),
    beyond_layers=True,
)
"""Every spelling in use, for models without a row."""
EVERY_SPELLING = Ignored(DEFAULT_EXTRAS)
"""The same, whatever the counts."""
