"""What proposes draft tokens for the next step.

A draft is a guess of the tokens that a request will get. The next step verifies the drafts of a
row in one pass, and keeps those that the sampler draws. So a drafter decides how fast tokens
come, and never which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_moe_compat.backend.step.batch import Request


class Drafter(Protocol):
    """Proposes drafts."""

    def propose(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        """Return drafts for each request, to follow its last known token.

        It is called once the tokens of a step are known.

        Args:
            requests: that drew tokens in this step.
            most: drafts per request.

        Returns:
            For each request up to ``most`` token ids for which the model has embeddings; an empty
            list for none.
        """
        ...

    def forget(self, req_id: str) -> None:
        """Let go of what is kept for a request; unknown ids are allowed."""
        ...
