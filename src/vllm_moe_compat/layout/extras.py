"""Tensors that a checkpoint carries and mlx-lm does not load.

Multi-token-prediction heads and vision towers are dropped by the families' own
``sanitize``. They may hold experts and FP8 weights too, and be incomplete, so
they are set aside before anything else is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extras:
    """How to know a name that upstream ignores.

    Attributes:
        prefixes: beginnings of names.
        parts: text anywhere in a name.
    """

    prefixes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def select(self, names: Iterable[str]) -> frozenset[str]:
        """Return those of the names that upstream ignores."""
        return frozenset(
            name
            for name in names
            if name.startswith(self.prefixes) or any(part in name for part in self.parts)
        )


DEFAULT_EXTRAS = Extras(
    prefixes=("vision_tower", "model.vision_tower", "model.visual", "visual."),
    parts=("mtp.", ".visual."),
)
"""Every spelling in use, for models without a row."""
