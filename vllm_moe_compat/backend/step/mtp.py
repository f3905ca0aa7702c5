"""Drafts from a model's own prediction heads (multi-token prediction).

After each pass of the target, ``follow`` gets its hidden states. Over the positions of a prompt the
heads run at once, since their next tokens are known. The hidden states of positions that draw
tokens wait until ``propose``, which knows what was drawn and accepted: the heads run over those
positions, and draft from the last one.

A request that is not proposed for (drafts are parked for it) is followed, so that drafts may
begin again in any step: its hidden states wait too, and the heads run over ``MOST_UNSEEN``
positions at a time, which costs less than a pass for each.

After a pass without hidden states, the heads have a gap in the pages of its requests, which get
no drafts until they are computed anew after a preemption. Other requests may start behind such
pages: their drafts are worse, and their answers are the same.

An error in the heads ends drafting, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from vllm_moe_compat.backend.model.prediction_heads import PredictionHeads
from vllm_moe_compat.backend.step.batch import Pass, Request
from vllm_moe_compat.backend.step.head_passes import HeadPasses, HeadRow
from vllm_moe_compat.log import logger

MOST_UNSEEN = 64


# Parts of hidden states are views of whole passes; so many are merged into an array of their own.
MOST_PARTS = 8


@dataclass(slots=True)
class _Followed:
    """What is kept for a request.

    Attributes:
        seen: the heads have the keys and values of the positions before this one.
        parts: ``[T, H]`` each, the target's hidden states at the positions from there on.
        lost: some positions are missing.
    """

    seen: int
    parts: list[mx.array] = field(default_factory=list)
    lost: bool = False

    @property
    def end(self) -> int:
        """The position after those that are seen or have hidden states."""
        return self.seen + sum(len(part) for part in self.parts)

    def cut(self, end: int) -> None:
        """Forget the positions from ``end`` on."""
        while self.parts and (surplus := self.end - end) > 0:
            last = self.parts.pop()
            if surplus < len(last):
                self.parts.append(last[: len(last) - surplus])
        self.seen = min(self.seen, end)

    def add(self, hidden: mx.array) -> None:
        """Add the hidden states ``[T, H]`` of the next positions."""
        self.parts.append(hidden)
        if len(self.parts) > MOST_PARTS:
            self.parts = [mx.concatenate(self.parts)]
            mx.eval(self.parts)

    def lose(self) -> None:
        """Take note that positions are missing."""
        self.parts, self.lost = [], True

    def take_until(self, request: Request, end: int) -> HeadRow:
        """Return the unseen positions before ``end``, which the heads see next."""
        hidden = mx.concatenate(self.parts) if len(self.parts) > 1 else self.parts[0]
        count = end - self.seen
        row = HeadRow(request, self.seen, hidden[:count])
        self.parts = [hidden[count:]] if end < self.end else []
        self.seen = end
        return row


class MtpDrafter:
    """A ``Drafter`` that also follows the passes of the target."""

    def __init__(self, passes: HeadPasses, max_model_len: int) -> None:
        """``max_model_len``: tokens of a sequence at most."""
        self.passes, self._max_model_len = passes, max_model_len
        self._followed: dict[str, _Followed] = {}
        self._failed = False

    def suspend(self) -> None:
        """Let go of the heads, and of all requests."""
        self._followed.clear()
        self.passes.close()

    def resume(self, heads: PredictionHeads) -> None:
        """Go on with other heads after ``suspend``; requests that were followed begin anew."""
        self.passes = self.passes.of(heads)

    def follow(self, work: Pass, hidden: mx.array | None) -> None:
        """Take the hidden states ``[B, T, H]`` of a pass of the target, which is evaluated.

        It has to come before the tokens of the pass are drawn. Without hidden states, the
        requests of the pass get no drafts any more.
        """
        if self._failed:
            return
        rows = []
        for row, request in enumerate(work.requests):
            start, length = int(work.offsets[row]), int(work.lengths[row])
            followed = self._followed.setdefault(request.req_id, _Followed(start))
            if followed.lost:
                continue
            if hidden is None or request.failed or start > followed.end:
                followed.lose()
                continue
            followed.cut(start)
            followed.add(hidden[row, :length])
            known = min(followed.end, request.num_tokens - 1)
            if start < known or known - followed.seen >= MOST_UNSEEN:
                rows.append(followed.take_until(request, known))
        if rows:
            try:
                self.passes.write(rows)
            except Exception as error:  # noqa: BLE001 - whatever the heads' code raises
                self._give_up(error)

    def propose(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        """Return drafts for each request; see ``Drafter``."""
        drafts: list[list[int]] = [[] for _ in requests]
        rows, counts, places = [], [], []
        for place, request in enumerate(requests):
            count = min(most, self._room(request))
            followed = self._followed.get(request.req_id)
            known = request.num_tokens - 1
            if followed is None or followed.lost or request.failed or count < 1:
                continue
            if not followed.seen < known <= followed.end:
                continue
            rows.append(followed.take_until(request, known))
            counts.append(count)
            places.append(place)
        if rows and not self._failed:
            try:
                found = self.passes.draft(self._caught_up(rows, most + 1), counts)
            except Exception as error:  # noqa: BLE001 - whatever the heads' code raises
                self._give_up(error)
            else:
                for place, tokens in zip(places, found, strict=True):
                    drafts[place] = tokens
        return drafts

    def forget(self, req_id: str) -> None:
        """Let go of a request that ended, or that begins again after a preemption."""
        self._followed.pop(req_id, None)

    def _room(self, request: Request) -> int:
        """Return how many drafts of a request the sequence and its blocks have room for."""
        storage = self.passes.storage
        slots = min(
            len(request.blocks[group]) * storage.block_sizes[group]
            for group in storage.groups.values()
        )
        # The first draft comes from the last position but one, the others each from the next.
        return min(self._max_model_len - request.num_tokens, slots - request.num_tokens + 2)

    def _caught_up(self, rows: Sequence[HeadRow], most: int) -> list[HeadRow]:
        """Run over all but the last position of rows of more than ``most``; return the rest."""
        short, long = [], []
        for row in rows:
            before, last = row.split(row.length - 1)
            if row.length > most:
                long.append(before)
            short.append(last if row.length > most else row)
        self.passes.write(long)
        return short

    def _give_up(self, error: Exception) -> None:
        """Draft nothing any more."""
        self._failed = True
        self._followed.clear()
        logger.error(
            "The model's prediction heads fail, and propose no drafts any more; requests go on "
            "without (%s: %s)",
            type(error).__name__,
            error,
            exc_info=error,
        )
