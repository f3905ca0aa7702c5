"""Drafts between two steps: who gets them, and what became of them.

vLLM schedules the drafts that the runner proposed after the step before, so they are known to it
and come back in the schedule. A step that verifies drafts tells how many were right.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.drafter import Drafter
from vllm_moe_compat.backend.step.mtp import MtpDrafter
from vllm_moe_compat.backend.step.parking import Parking
from vllm_moe_compat.envs import PARK_DRAFTS


class Lengths(Protocol):
    """Decides how many drafts each request gets."""

    def lengths(self, requests: Sequence[Request]) -> list[int]:
        """Return how many drafts to propose for each request; 0 for none."""
        ...

    def kept(self, requests: Sequence[Request], proposed: Sequence[int]) -> list[int]:
        """Return how many of the proposed drafts of each request to verify."""
        ...

    def observe(
        self,
        requests: Sequence[Request],
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds: float,
    ) -> None:
        """Take note of a step that gave each request ``1 + accepted[i]`` tokens.

        Args:
            requests: of the rows.
            drafted: drafts of each row that the pass verified.
            accepted: how many of them were right.
            seconds: that the pass, the sampling and the drafting took.
        """
        ...

    def forget(self, req_id: str) -> None:
        """Let go of what is known of a request."""
        ...


class Always:
    """Gives every request the same number of drafts."""

    def __init__(self, most: int) -> None:
        self.most = most

    def lengths(self, requests: Sequence[Request]) -> list[int]:
        """Return ``most`` for each request."""
        return [self.most] * len(requests)

    def kept(self, requests: Sequence[Request], proposed: Sequence[int]) -> list[int]:
        """Return all of them."""
        return list(proposed)

    def observe(
        self,
        requests: Sequence[Request],
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds: float,
    ) -> None:
        """Take no note."""

    def forget(self, req_id: str) -> None:
        """There is nothing to let go of."""


def lengths_of(most: int) -> Lengths:
    """Return what decides about up to ``most`` drafts per request."""
    return Parking(most) if most and PARK_DRAFTS.read() == "1" else Always(most)


def useful(request: Request) -> int:
    """Return how many drafts a request could accept before it has all tokens it asked for."""
    most: int | None = request.params.max_tokens
    return sys.maxsize if most is None else max(0, most - len(request.output) - 1)


class Drafting:
    """The drafts of one engine.

    Attributes:
        follower: the drafter, if it needs the hidden states of all passes.
    """

    def __init__(self, drafter: Drafter, lengths: Lengths, state_block: int | None = None) -> None:
        """Make the drafts of an engine.

        Args:
            drafter: proposes tokens.
            lengths: decides how many.
            state_block: tokens per block of states that are cached; None without any.
        """
        self.drafter, self.lengths, self.state_block = drafter, lengths, state_block
        self.follower = drafter if isinstance(drafter, MtpDrafter) else None
        # Whether nobody was to get a draft in the last step that proposed.
        self.idle = False
        self._proposed: dict[str, list[int]] = {}
        self._seconds = 0.0  # of the last ``propose``

    def observe(self, requests: Sequence[Request], accepted: Sequence[int], seconds: float) -> None:
        """Take note of a step, before the next ``propose``.

        Args:
            requests: that drew tokens.
            accepted: drafts of each that were right.
            seconds: that the pass and the sampling took.
        """
        drafted = [len(request.drafts) for request in requests]
        self.lengths.observe(requests, drafted, accepted, seconds + self._seconds)

    def propose(self, requests: Sequence[Request], most: int = sys.maxsize) -> None:
        """Draft up to ``most`` tokens for each of the requests that drew tokens."""
        begin = time.perf_counter()
        wanted = [min(count, most) for count in self.lengths.lengths(requests)]
        self.idle = not any(wanted)
        lengths = [
            min(count, useful(r), self._within_block(r))
            for r, count in zip(requests, wanted, strict=True)
        ]
        drafted = [(r, count) for r, count in zip(requests, lengths, strict=True) if count]
        found: list[list[int]] = []
        if drafted:
            longest = max(count for _, count in drafted)
            found = self.drafter.propose([request for request, _ in drafted], longest)
        proposed = {request.req_id: list[int]() for request in requests}
        for (request, count), drafts in zip(drafted, found, strict=True):
            proposed[request.req_id] = drafts[:count]
        kept = self.lengths.kept(requests, [len(drafts) for drafts in proposed.values()])
        self._proposed = {
            req_id: drafts[:count]
            for (req_id, drafts), count in zip(proposed.items(), kept, strict=True)
        }
        self._seconds = time.perf_counter() - begin

    def _within_block(self, request: Request) -> int:
        """Return how many drafts end with the block of states that is being filled.

        vLLM caches the state at the end of a block when a step goes on from there. Of one that a
        step goes over by its drafts, it gives the block away before.
        """
        if self.state_block is None:
            return sys.maxsize
        return self.state_block - request.num_tokens % self.state_block

    def take(self) -> dict[str, list[int]]:
        """Return the drafts of the last ``propose`` by request, once."""
        proposed, self._proposed = self._proposed, {}
        return proposed

    def forget(self, req_id: str) -> None:
        """Let go of a request that ended."""
        self.drafter.forget(req_id)
        self.lengths.forget(req_id)
