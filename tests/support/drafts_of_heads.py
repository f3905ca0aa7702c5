"""Drafts of an engine's prediction heads, and the same computed without pages or batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.engine import worker

# Half of what a logit may differ by between one pass over all tokens and passes over pages.
TOLERANCE = 1e-3


def speculating(most: int) -> dict[str, Any]:
    """Settings of an engine whose heads draft up to ``most`` tokens of a request."""
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": most}}


def write_with_heads(path: Path, family: str) -> Path:
    """Write a small random checkpoint of ``family`` in the form of its releases, with a head."""
    from parity import released_heads

    return released_heads.write(released_heads.make(family), path)


class Proposals:
    """All drafts that an engine's heads propose from now on.

    Attributes:
        made: tokens of the request, and the drafts after them.
    """

    def __init__(self, llm: Any) -> None:
        self.made: list[tuple[list[int], list[int]]] = []
        self._served = worker(llm).served
        self.drafter = worker(llm).runner.drafting.follower
        propose = self.drafter.propose

        def note(requests: Sequence[Any], most: int) -> list[list[int]]:
            found: list[list[int]] = propose(requests, most)
            for request, drafts in zip(requests, found, strict=True):
                self.made.append((request.tokens(0, request.num_tokens), drafts))
            return found

        self.drafter.propose = note

    def check(self, most: int = 12) -> None:
        """Compare some of them with the heads over the whole sequence, on mlx-lm's own caches.

        Each draft has the largest logit after the drafts before it, or as good as that.
        """
        made = [one for one in self.made if one[1]]
        assert made
        for tokens, drafts in made[:: -(-len(made) // most)]:
            self._check_one(tokens, drafts)

    def _check_one(self, tokens: list[int], drafts: list[int]) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        from vllm_moe_compat.backend.model import backbone

        model, heads = self._served.model, self._served.heads
        hidden = backbone.of_model(model)(mx.array([tokens[:-1]]), cache=make_prompt_cache(model))
        cache = [KVCache() for _ in heads.layers]
        given = mx.array([tokens[1:]])
        for place, draft in enumerate(drafts):
            logits, hidden = heads(given, hidden, cache)
            last = logits[0, -1]
            short = (last.max() - last[draft]).item()
            assert short <= TOLERANCE, (len(tokens), place, drafts, short)
            given, hidden = mx.array([[draft]]), hidden[:, -1:]


def accepted(llm: Any) -> tuple[int, int]:
    """Drafts that were accepted, and all that were verified."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    name = "vllm:spec_decode_num_{}_tokens"
    return found[name.format("accepted")].value, found[name.format("draft")].value
