"""Extra tensors of a checkpoint that the mlx-lm module does not load.

Most modules' ``sanitize`` drops multi-token-prediction heads and vision towers. These may hold
experts and FP8 weights and may be incomplete, so they are removed before any other check.
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
    """Patterns for the names of extra tensors.

    Attributes:
        prefixes: beginnings of names.
        parts: text anywhere in a name.
        beyond_layers: whether decoder layers beyond the config's count are extra. Some families
            append their prediction head as further layers.
        beyond_experts: whether experts beyond the config's count are extra. LongCat's router
            has identity experts, for which transformers writes weights.
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
        """Return the patterns with the counts of this config.

        Raises:
            LayoutError: a count in the config is not a valid value.
        """
        return Ignored(
            self,
            layers=layer_count(config) if self.beyond_layers else None,
            experts=expert_count(config) if self.beyond_experts else None,
        )


@dataclass(frozen=True, slots=True)
class Ignored:
    """Patterns for extra tensors, with the counts of one config.

    Attributes:
        extras: the patterns.
        layers: number of decoder layers; None if the count does not matter.
        experts: number of routed experts; None if the count does not matter.
    """

    extras: Extras
    layers: int | None = None
    experts: int | None = None

    def select(self, names: Collection[str]) -> frozenset[str]:
        """Return the names of extra tensors among ``names``."""
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
"""All patterns in use, for models without a row."""
