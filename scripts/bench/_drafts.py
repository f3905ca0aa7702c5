"""Drafters and counters of the speculation benchmark, in place of a server's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_moe_compat.backend.step.drafting import Always


class Oracle:
    """Proposes tokens that are known to come, or are known not to."""

    def __init__(self, tokens: dict[int, list[int]], vocab: int) -> None:
        """``tokens``: a prompt's first token → what follows the prompt."""
        self.tokens, self.vocab = tokens, vocab
        self.wrong = False

    def propose(self, requests: Sequence[Any], most: int) -> list[list[int]]:
        found = []
        for request in requests:
            done = len(request.output)
            coming = self.tokens[request.prompt[0]][done : done + most]
            found.append([(t + self.wrong) % self.vocab for t in coming])
        return found

    def forget(self, req_id: str) -> None:
        pass


class Counted(Always):
    """Gives every request the same number of drafts, and counts what becomes of them."""

    def __init__(self, most: int = 0) -> None:
        super().__init__(most)
        self.clear()

    def clear(self) -> None:
        self.rows = self.tokens = 0
        self.drafted: list[int] = []
        self.accepted: list[int] = []

    def observe(
        self,
        requests: Sequence[Any],
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds: float,
    ) -> None:
        for proposed, right in zip(drafted, accepted, strict=True):
            self.rows += 1
            self.tokens += 1 + right
            for counts, count in ((self.drafted, proposed), (self.accepted, right)):
                counts += [0] * (count - len(counts))
                for place in range(count):
                    counts[place] += 1

    def result(self) -> dict[str, Any]:
        """Row passes per token, the share of drafts accepted, and of each position."""
        drafts = sum(self.drafted)
        return {
            "passes_per_token": round(self.rows / self.tokens, 3),
            "proposed": drafts,
            "accepted": round(sum(self.accepted) / drafts, 3) if drafts else None,
            # A position counts where a draft was proposed for it.
            "accepted_by_position": [
                round((self.accepted[i] if i < len(self.accepted) else 0) / count, 3)
                for i, count in enumerate(self.drafted)
            ],
        }
