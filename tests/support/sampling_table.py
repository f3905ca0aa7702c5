"""A model that is a table, for the sampler alone: logits as a function of the tokens so far.

The same table serves runs with drafts and without, so whatever differs between two runs is the
sampler's doing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from vllm_moe_compat.backend.step.batch import Request

VOCAB = 512
# Tokens that the table makes likely, so that penalties, stop tokens and drafts meet them.
LIKELY = 12

Drafting = Callable[["Row"], list[int]]


def table(tokens: Sequence[int]) -> Any:
    """Logits ``[V]`` after ``tokens``, which depend on the last two."""
    draw = np.random.default_rng([tokens[-1], tokens[-2], 7])
    logits = draw.normal(size=VOCAB).astype(np.float32)
    logits[:LIKELY] += 4
    return logits


@dataclass
class Row:
    """A request of the table, and what it got.

    Attributes:
        request: as the runner keeps it.
        count: tokens that it shall get.
        model: the table.
        allowed: token ids that a grammar allows after some output, or None.
        known: its tokens without drafts, from which drafts are made.
        logprobs: by token: ids, log-probabilities and rank.
    """

    request: Request
    count: int
    model: Callable[[Sequence[int]], Any] = table
    allowed: Callable[[Sequence[int]], Sequence[int]] | None = None
    known: list[int] = field(default_factory=list)
    logprobs: list[tuple[Any, Any, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        return len(self.tokens) < self.count and not self.request.failed

    def logits(self) -> list[Any]:
        """A row for the last token, and one for each draft."""
        before = self.request.prompt + self.request.output
        drafts = self.request.drafts
        return [self.model(before + drafts[:i]) for i in range(len(drafts) + 1)]

    def masks(self) -> list[Any]:
        assert self.allowed is not None
        rows = []
        for i in range(len(self.request.drafts) + 1):
            bits = np.zeros(VOCAB, dtype=bool)
            bits[list(self.allowed(self.request.output + self.request.drafts[:i]))] = True
            rows.append(np.packbits(bits, bitorder="little").view(np.int32))
        return rows


def run(sampler: Any, rows: Sequence[Row], drafting: Drafting, *, steps: int = 400) -> None:
    """Sample until every row has its tokens; ``drafting`` makes a row's drafts of each step."""
    for _ in range(steps):
        batch = [row for row in rows if row.wanted]
        if not batch:
            return
        step(sampler, batch, drafting)
    raise AssertionError(f"no end after {steps} steps")


def step(sampler: Any, rows: Sequence[Row], drafting: Drafting) -> Any:
    """Sample once; return what the sampler returned."""
    from vllm.v1.core.sched.output import GrammarOutput

    by_id = {row.request.req_id: row for row in rows}
    for row in rows:
        row.request.drafts = drafting(row)
    if not rows:
        return None
    order = sampler.select([row.request for row in rows])
    assert sorted(order) == sorted(by_id)
    logits = np.stack([one for req_id in order for one in by_id[req_id].logits()])
    guided = [row for row in rows if row.allowed is not None]
    grammar = None
    if guided:
        ids = [row.request.req_id for row in guided]
        grammar = GrammarOutput(ids, np.stack([mask for row in guided for mask in row.masks()]))
    scheduled: Any = SimpleNamespace(
        num_scheduled_tokens={req_id: 1 + len(by_id[req_id].request.drafts) for req_id in order},
        scheduled_spec_decode_tokens={
            row.request.req_id: row.request.drafts for row in rows if row.request.drafts
        },
    )
    found, tokens, logprobs = sampler.verify(mx.array(logits), scheduled, grammar)
    assert sorted(found) == sorted(order)
    for index, (req_id, new) in enumerate(zip(found, tokens, strict=True)):
        row = by_id[req_id]
        # As vLLM's scheduler does it.
        if logprobs is not None and row.request.params.logprobs is not None:
            own = logprobs.slice_request(index, len(new))
            row.logprobs += zip(own.logprob_token_ids, own.logprobs, own[2], strict=True)
        row.tokens += new
    return found, tokens, logprobs


def no_drafts(row: Row) -> list[int]:
    return []


def right(count: int, *wrong: int) -> Drafting:
    """``count`` right drafts, then others."""

    def draft(row: Row) -> list[int]:
        at = len(row.tokens)
        return [*row.known[at : at + count], *wrong]

    return draft


def mixed(seed: int) -> Drafting:
    """Of all kinds, another one for each request and step."""
    draw = np.random.default_rng(seed)

    def draft(row: Row) -> list[int]:
        count = int(draw.integers(0, 5))
        garbage = [int(token) for token in draw.integers(0, LIKELY + 3, draw.integers(0, 3))]
        return right(count, *garbage)(row)

    return draft
