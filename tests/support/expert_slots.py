"""Slots of one layer, kept naively: what the policy has to equal.

Written from the policy's description, with sets, dicts and sorting, and simulated expert by
expert: each group's reads are done one after the other against the slots as they then are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Slots:
    """``count`` slots; counters of what passes found in them.

    Attributes:
        last: log2 of an expert's priority, plus the passes so far in half-lives.
        held: slot → expert.
    """

    count: int
    half_life: float = 64
    flowing: float = 0.5
    last: dict[int, float] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    passes: int = 0
    hits: int = 0
    misses: int = 0

    def run(self, uses: Mapping[int, int]) -> list[tuple[set[int], list[int]]]:
        """One pass that wants the keys of ``uses``: (experts, those read) of each group."""
        self.passes += 1
        for expert, count in uses.items():
            value = self.passes * (1 / self.half_life) + 0.5 * float(np.log2(count))
            self.last[expert] = float(np.logaddexp2(self.last.get(expert, -np.inf), value))
        resident = set(self.held.values())
        hits, missing = resident & uses.keys(), uses.keys() - resident
        self.hits += len(hits)
        self.misses += len(missing)
        if len(hits) + len(missing) <= self.count:
            places = self._cheapest(
                slot for slot in range(self.count) if self.held.get(slot) not in hits
            )
            order = sorted(missing)
            for expert, slot in zip(order, places, strict=False):
                self.held[slot] = expert
            return [(set(uses), order)]
        stay = self._stay(resident, missing)
        places = self._cheapest(
            slot for slot in range(self.count) if self.held.get(slot) not in stay
        )
        places.sort(key=lambda slot: self.held.get(slot) in hits)  # Stable: who is idle goes first.
        groups: list[tuple[set[int], list[int]]] = [(set(hits), [])]
        busy = set(hits)
        order = sorted(missing, key=lambda expert: (self.last[expert], expert))
        for expert, slot in zip(order, itertools.cycle(places), strict=False):
            if self.held.get(slot) in busy:
                groups.append((set(), []))
                busy = set()
            self.held[slot] = expert
            busy.add(expert)
            groups[-1][0].add(expert)
            groups[-1][1].append(expert)
        return groups

    def _cheapest(self, slots: Iterable[int]) -> list[int]:
        def price(slot: int) -> tuple[float, int, int]:
            expert = self.held.get(slot, -1)
            return self.last.get(expert, -np.inf), expert, slot

        return sorted(slots, key=price)

    def _stay(self, resident: set[int], missing: set[int]) -> set[int]:
        best = sorted(
            resident | missing,
            key=lambda expert: (-self.last[expert], expert in missing, expert),
        )[: self.count]
        most = self.count - max(1, round(self.flowing * self.count))
        return set([expert for expert in best if expert in resident][:most])
