"""Every family that mlx-lm and transformers both have, as one tiny configuration each.

Sizes are the smallest in which every kind of layer that the family knows occurs:
dense first layers, shared experts, sliding windows, state layers. No two sides of
an expert are equal, or a missing transposition would not show.
"""

from __future__ import annotations

from parity.dense import DENSE
from parity.family import Family
from parity.moe_sigmoid import SIGMOID
from parity.moe_softmax import SOFTMAX
from parity.variants import VARIANTS

MOE: tuple[Family, ...] = SOFTMAX + SIGMOID
FAMILIES: dict[str, Family] = {family.name: family for family in MOE + DENSE + VARIANTS}
