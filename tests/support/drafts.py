"""Drafts whose acceptance is known beforehand, and what a request holds after a step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from support.engine import worker
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.drafting import Always

Pattern = Callable[[random.Random, int, int], tuple[int, int]]
"""From a source of numbers, the turn of a request and the most drafts: right ones, and all."""


def _mixed(draw: random.Random, turn: int, most: int) -> tuple[int, int]:
    length = draw.randint(0, most)
    return draw.randint(0, length), length


PATTERNS: dict[str, Pattern] = {
    "nothing": lambda draw, turn, most: (0, 0),
    "none right": lambda draw, turn, most: (0, most),
    "all right": lambda draw, turn, most: (most, most),
    "each prefix": lambda draw, turn, most: (turn % (most + 1), most),
    "mixed": _mixed,
}
# Ids that no embedding has. The runner computes what stands before the first one.
NO_IDS = (-1, 10**6)


class Oracle:
    """A drafter that knows the answers, and is right as often as its pattern says.

    Attributes:
        accepted: how often so many drafts were accepted, by (right, all proposed).
    """

    def __init__(
        self,
        answer: Callable[[Sequence[int], int], list[int]],
        pattern: str,
        *,
        seed: int = 0,
        no_ids: bool = False,
    ) -> None:
        """Make an oracle.

        Args:
            answer: the tokens after a prompt, as many as asked for.
            pattern: of ``PATTERNS``.
            seed: of what is drawn.
            no_ids: a wrong draft may be an id that the model does not have.
        """
        self._answer, self._pattern = answer, PATTERNS[pattern]
        self._draw, self._no_ids = random.Random(seed), no_ids
        self._turns: Counter[str] = Counter()
        self._open: dict[str, tuple[int, int, int]] = {}
        self.accepted: Counter[tuple[int, int, int]] = Counter()

    def propose(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        """Return drafts for each request; see ``Drafter``."""
        return [self._of(request, most) for request in requests]

    def forget(self, req_id: str) -> None:
        """Let go of a request."""
        self._open.pop(req_id, None)

    def _of(self, request: Request, most: int) -> list[int]:
        done = len(request.output)
        if request.req_id in self._open:
            before, right, count = self._open.pop(request.req_id)
            assert 1 <= done - before <= 1 + right, (before, done, right, count)
            self.accepted[right, count, done - before - 1] += 1
        turn = self._turns[request.req_id]
        self._turns[request.req_id] += 1
        right, count = self._pattern(self._draw, turn, most)
        drafts = self._answer(request.prompt, done + count)[done:]
        for place in range(right, count):
            wrong = (drafts[place] + 1 + self._draw.randrange(300)) % 500
            drafts[place] = self._draw.choice(NO_IDS) if self._no_ids else wrong
        self._open[request.req_id] = done, right, count
        return drafts


def put_in(llm: Any, oracle: Oracle, most: int, *, over_blocks: bool = True) -> None:
    """Have an engine with speculation draft by the oracle, and never park.

    ``over_blocks``: drafts may go over the end of a block of states.
    """
    drafting = worker(llm).runner.drafting
    if over_blocks:
        drafting.state_block = None
    drafting.drafter, drafting.lengths = oracle, Always(most)


def speculating(most: int) -> dict[str, Any]:
    """Settings of an engine that verifies up to ``most`` drafts of a request."""
    config = {"method": "ngram", "num_speculative_tokens": most, "prompt_lookup_max": 3}
    return {"speculative_config": config}


def computed(request: Request) -> int:
    """Return how many tokens were computed when the last one was drawn: all others."""
    return request.num_tokens - 1


def held(llm: Any, request: Request) -> tuple[list[bytes], list[np.ndarray]]:
    """Return the states after ``computed(request)`` tokens, and their keys and values.

    The latter per layer of softmax attention, ``[planes, heads, tokens, row]``, as far as a window
    shows them.
    """
    import mlx.core as mx

    storage, done = worker(llm).runner.storage, computed(request)
    states: list[bytes] = []
    for bank in storage.states.banks:
        if request.req_id in bank.req_ids:
            (row,) = (i for i, one in enumerate(bank.req_ids) if one == request.req_id)
            for state in bank.rows([row]):
                states += [np.array(part).tobytes() for part in state]
    keys = []
    for layer in storage.layers:
        if not isinstance(layer, AttentionLayer):
            continue
        group = storage.groups[layer.index]
        block, blocks = storage.block_sizes[group], request.blocks[group]
        count = -(-done // block)
        pages = storage.pools[layer.index].pages[mx.array(blocks[:count])]
        size = layer.planes * layer.kv_heads * block * layer.row
        found = np.array(pages[:, :size]).reshape(
            count, layer.planes, layer.kv_heads, block, layer.row
        )
        rows = np.concatenate(list(found), axis=2)
        first = max(0, done - (layer.window or done))
        keys.append(rows[:, :, first:done])
    return states, keys
