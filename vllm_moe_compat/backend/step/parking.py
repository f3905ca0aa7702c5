"""Which requests get drafts, and how many: those with which tokens come faster than without.

A pass that verifies drafts costs more than one of one token per request, and how much more
depends on the machine, the model and the number of requests. Whether it pays depends on how many
drafts are right. Both are measured while serving (``pass_costs``, ``acceptance``), and before each
step the number of drafts is chosen that promises most tokens per second. If that is none, drafts
are *parked*, for these requests and this size of the batch.

Parked drafts are tried again: for one step, and as long as each step pays. What tries lose is
limited to a share of the time, a smaller one after each that loses.

Time decides how fast tokens come, never which tokens: verification is exact. With several ranks,
one rank decides.

A drafter with keys and values of its own must not count on being asked in every step. It has to
follow the tokens of a parked request too, or to catch up later: parking may last for thousands of
tokens, and it may end in any step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_moe_compat.backend.step.acceptance import Acceptance, Float
from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.pass_costs import FAR_OFF, PassCosts, group_of
from vllm_moe_compat.log import logger

# By how much drafts have to be faster than none.
GAIN = 1.03
# Drafts per request in the first passes that measure the cost.
FIRST_DRAFTS = 4
# The share of the time that may be lost by tries, and by how much it is divided at most.
TRIES, MOST_DIVIDED = 0.02, 4


class Parking:
    """Decides before each step; ``observe`` comes after a step and before the next decision."""

    def __init__(self, most: int) -> None:
        """``most``: drafts of a request in one pass."""
        self.most = most
        self.costs, self.acceptance = PassCosts(), Acceptance(most)
        self._said: set[str | int] = set()
        # Seconds that tries may lose, the divisor of their share, and whether a try goes on.
        self._credit, self._divisor, self._goes_on = 0.0, 1, False
        # The speed without the try of the next step; 0 where it is none.
        self._tried_against = 0.0

    def lengths(self, requests: Sequence[Request]) -> list[int]:
        """Return how many drafts to propose for each request of the next step; 0 for none."""
        return self.kept(requests, [self.most] * len(requests))

    def kept(self, requests: Sequence[Request], proposed: Sequence[int]) -> list[int]:
        """Return how many of the proposed drafts to verify.

        Rows of a pass have the same width, so a few drafts of one request may not be worth it.
        """
        self._tried_against = 0.0
        longest, rows = max(proposed, default=0), len(requests)
        if not longest or self.costs.needs_one_token(rows):
            return [0] * rows
        costs = np.asarray(self.costs.relative(rows, range(1, 2 + longest)))
        if not len(costs):
            return [min(count, FIRST_DRAFTS) for count in proposed]
        req_ids = [request.req_id for request in requests]
        expected = self.acceptance.expected(req_ids)
        # [longest + 1, rows]: drafts of each request with 0, 1, … of them at most.
        kept = np.minimum(np.arange(longest + 1)[:, None], np.asarray(proposed))
        # Tokens per second; 1 is the speed without drafts.
        speeds = (1 + expected[np.arange(rows), kept].mean(axis=1)) / costs
        if_right = (1 + kept.mean(axis=1)) / costs
        best, hopeful = int(speeds.argmax()), int(if_right.argmax())
        if speeds[best] < GAIN:
            best = 0
            self._say(rows, hopeful, costs, bool(if_right[hopeful] >= GAIN))
        if hopeful > best and self._may_try(rows, float(costs[hopeful]), float(speeds[best])):
            if not self._goes_on:
                self.acceptance.mistrust(req_ids, since=best)
            self._tried_against, best = float(speeds[best]), hopeful
        return [min(best, count) for count in proposed]

    def observe(
        self,
        requests: Sequence[Request],
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds: float | None,
    ) -> None:
        """Take note of a step that gave each request ``1 + accepted[i]`` tokens.

        Args:
            requests: of the rows.
            drafted: drafts of each row that the pass verified.
            accepted: how many of them were right.
            seconds: that the pass, the sampling and drafting took; None for a step with other
                work, such as a prompt.
        """
        rows, width = len(requests), 1 + max(drafted, default=0)
        if not rows:
            return
        if width > 1:
            req_ids = [request.req_id for request in requests]
            self.acceptance.add(req_ids, np.asarray(drafted), np.asarray(accepted))
        if seconds is None:
            return
        self.costs.add(rows, width, seconds)
        self._credit += TRIES / self._divisor * seconds
        if self._tried_against and width > 1:
            one_token = self.costs.seconds_of_one_token(rows)
            earned = (1 + sum(accepted) / rows) / self._tried_against * one_token
            self._goes_on = earned >= seconds
            if self._goes_on:
                self._divisor = 1
            else:
                # Not more for a pass that was interrupted.
                usual = max(self.costs.relative(rows, [width]), default=1.0) * one_token
                self._credit -= max(0.0, min(seconds, FAR_OFF * usual) - earned)
                self._divisor = min(2 * self._divisor, MOST_DIVIDED)

    def forget(self, req_id: str) -> None:
        """Let go of a request."""
        self.acceptance.forget(req_id)

    def _may_try(self, rows: int, cost: float, reference: float) -> bool:
        """Return whether a step of relative ``cost`` may be tried."""
        # If no draft is right.
        loss = (cost - 1 / reference) * self.costs.seconds_of_one_token(rows)
        # What was not used is not saved up: tries are rare, and not in a row.
        self._credit = min(self._credit, loss)
        return self._goes_on or self._credit >= loss

    def _say(self, rows: int, count: int, costs: Float, could_pay: bool) -> None:
        """Log once why drafts are parked."""
        reason = "requests" if could_pay else group_of(rows)
        if reason in self._said:
            return
        self._said.add(reason)
        again = "They are tried again from time to time."
        if could_pay:
            logger.info(
                "Drafts are parked for requests of which too few are right: verifying %d per "
                "request takes %.2f times a pass without drafts (batch of %d; of first drafts, "
                "%.0f%% were right lately). %s",
                *(count, costs[count], rows, 100 * self.acceptance.rate, again),
            )
        else:
            logger.info(
                "Drafts are parked for batches of %d requests: verifying %d per request takes "
                "%.2f times a pass without drafts. %s",
                *(rows, count or 1, costs[count or 1], again),
            )
