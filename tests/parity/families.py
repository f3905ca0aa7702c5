"""Every family that mlx-lm and transformers both have, as one tiny configuration each.

Sizes are the smallest in which every kind of layer that the family knows occurs:
dense first layers, shared experts, sliding windows, state layers. No two sides of
an expert are equal, or a missing transposition would not show.
"""

from __future__ import annotations

from parity.available import missing
from parity.dense import DENSE
from parity.family import Family
from parity.moe_sigmoid import SIGMOID
from parity.moe_softmax import SOFTMAX
from parity.variants import VARIANTS

_EVERY = SOFTMAX + SIGMOID + DENSE + VARIANTS
LEFT_OUT = {f.name: why for f in _EVERY if (why := missing(f)) is not None}
"""Family → what this environment does not have of it; empty with the newest."""
MOE: tuple[Family, ...] = tuple(f for f in SOFTMAX + SIGMOID if f.name not in LEFT_OUT)
FAMILIES: dict[str, Family] = {f.name: f for f in _EVERY if f.name not in LEFT_OUT}
EVERY = {f.name: f for f in _EVERY}
"""Those that are left out as well."""
