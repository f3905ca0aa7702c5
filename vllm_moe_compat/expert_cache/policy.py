"""Which slot a missing expert takes, and in which groups a pass computes its experts.

One ``Policy`` keeps the books of one layer's slots: which expert lies in which slot. It moves no
bytes; ``CachedExperts`` carries out what ``plan`` says. In goes what a pass wants of a layer, its
distinct experts; out come groups, each with the experts that it computes and those of them that
are read before.

An expert's priority is the sum over the passes that used it of ``sqrt(uses) · 2^(-age / H)``: age
in passes, ``uses`` the number of tokens of the pass that chose it. So it is recency and frequency
in one number (LRFU), with the half-life ``H``: near 0 it is LRU, without end LFU. Priorities are
kept as ``log2(sum) + now / H``. All age alike, so an expert that is not used keeps its number.

A pass that wants more experts than there are slots (a prefill) would leave nothing of what decode
uses. It takes half of the slots at most: experts of low priority are read, computed and
overwritten there in turn, and the others stay. ``scripts/bench/policy`` compares the choices.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

HALF_LIFE = 64
"""Passes after which a use counts half."""

FLOWING = 0.5
"""Share of the slots that a pass with more experts than slots may take from others."""


class Group(NamedTuple):
    """Experts that are computed together.

    Attributes:
        experts: their numbers, ascending, int64 [n], n <= slots.
        slots: the slot of each when the group is computed, int64 [n].
        missing: (expert, slot) of those that have to be read before, in ascending order of slots'
            choice; every other expert of the group is in its slot already.
    """

    experts: Ints
    slots: Ints
    missing: list[tuple[int, int]]


class Policy:
    """Books of the slots of one layer.

    Args:
        slots: C, slots of the layer, at least 1.
        experts: E, experts of the layer.
        half_life: passes after which a use counts half.
        flowing: share of the slots that a pass with more experts than slots may take.

    Attributes:
        slot_of: the slot of each expert, -1 if it has none, int64 [E].
        expert_of: the expert in each slot, -1 if it is free, int64 [C].
        priority: of each expert, float64 [E]; -inf before its first use.
        passes: passes planned so far.
    """

    def __init__(
        self,
        slots: int,
        experts: int,
        *,
        half_life: float = HALF_LIFE,
        flowing: float = FLOWING,
    ) -> None:
        if slots < 1 or experts < 1:
            raise ValueError(f"a policy needs slots and experts, got {slots} and {experts}")
        self.slots = slots
        self.experts = experts
        self.slot_of: Ints = np.full(experts, -1, np.int64)
        self.expert_of: Ints = np.full(slots, -1, np.int64)
        self.priority = np.full(experts, -np.inf)
        self.passes = 0
        self._age = 1 / half_life
        self._least_open = max(1, round(flowing * slots))

    def plan(self, wanted: Ints, uses: Ints | None = None) -> list[Group]:
        """Groups in which the wanted experts are computed, to be carried out in order.

        The books are changed at once, as if every group had been carried out. Whoever does not
        read a missing expert, because reading fails or the pass ends early, says so by ``forget``.

        Args:
            wanted: distinct experts of the pass, ascending, int64 [W].
            uses: how many tokens of the pass chose each, [W]; one each if left out.

        Returns:
            The first group has all wanted experts that are in slots; together the groups have
            every wanted expert once. Nothing is missing twice, so nothing is read twice.
        """
        self.passes += 1
        value: float | npt.NDArray[np.float64] = self.passes * self._age
        if uses is not None:
            value = value + 0.5 * np.log2(uses)
        self.priority[wanted] = np.logaddexp2(self.priority[wanted], value)
        slots = self.slot_of[wanted]
        absent = slots < 0
        if not absent.any():
            return [Group(wanted, slots, [])]
        hits, missing = wanted[~absent], wanted[absent]
        free = np.ones(self.slots, bool)
        free[slots[~absent]] = False
        if len(missing) <= np.count_nonzero(free):
            taken = self._least_first(np.flatnonzero(free))[: len(missing)]
            return [self._group(hits, missing, taken)]
        return self._flow(hits, missing, free)

    def forget(self, expert: int) -> None:
        """The expert's bytes are not in its slot; the slot is free. Nothing if it has no slot."""
        slot = self.slot_of[expert]
        if slot >= 0:
            self.slot_of[expert] = self.expert_of[slot] = -1

    def _flow(self, hits: Ints, missing: Ints, unused: npt.NDArray[np.bool_]) -> list[Group]:
        """Groups of more experts than fit, through the slots that are open to them.

        Args:
            hits: wanted experts that are in slots.
            missing: the other wanted ones.
            unused: which slots hold no wanted expert, [C].
        """
        kept = self._kept(missing)
        open_slots = self._least_first(
            np.flatnonzero(~np.isin(self.expert_of, kept) | (self.expert_of < 0))
        )
        # What the first group computes is overwritten from the second on.
        open_slots = np.concatenate(
            [open_slots[unused[open_slots]], open_slots[~unused[open_slots]]]
        )
        first = int(np.count_nonzero(unused[open_slots]))
        # The last that pass through stay, so these have the highest priority.
        missing = missing[np.lexsort((missing, self.priority[missing]))]
        groups = []
        begin, end = 0, first
        while begin < len(missing):
            turns = np.arange(begin, min(end, len(missing)))
            groups.append(self._group(hits, missing[turns], open_slots[turns % len(open_slots)]))
            hits = hits[:0]
            begin, end = end, end + len(open_slots)
        return groups

    def _kept(self, missing: Ints) -> Ints:
        """Experts that stay in their slots while others flow through the rest."""
        resident = self.expert_of[self.expert_of >= 0]
        everyone = np.concatenate([resident, missing])
        is_missing = np.arange(len(everyone)) >= len(resident)
        best = np.lexsort((everyone, is_missing, -self.priority[everyone]))[: self.slots]
        kept: Ints = everyone[best[~is_missing[best]]][: self.slots - self._least_open]
        return kept

    def _least_first(self, slots: Ints) -> Ints:
        """Slots in the order in which they are given away: free ones, then by priority."""
        held = self.expert_of[slots]
        priority = np.where(held < 0, -np.inf, self.priority[held])
        ordered: Ints = slots[np.lexsort((slots, held, priority))]
        return ordered

    def _group(self, hits: Ints, missing: Ints, taken: Ints) -> Group:
        """Put missing experts into slots, and give the group of them and the hits."""
        before = self.expert_of[taken]
        self.slot_of[before[before >= 0]] = -1
        self.slot_of[missing] = taken
        self.expert_of[taken] = missing
        experts = np.sort(np.concatenate([hits, missing]))
        pairs = list(zip(missing.tolist(), taken.tolist(), strict=True))
        return Group(experts, self.slot_of[experts], pairs)
