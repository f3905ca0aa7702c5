"""Verification: a step draws as many tokens of a request as equal its drafts, and one more.

A request with ``k`` drafts has ``k + 1`` rows of logits: row ``t`` is right if the drafts before it
are what is drawn. So the rows are drawn one after another, each exactly as without drafts, from the
model's own distribution and with the state that the request's parameters have at that position. A
draft is accepted if it equals the token that is drawn in its place; the first other token is the
last one. For drafts that are given tokens, and not samples of a known distribution, that accepts
with the probabilities of rejection sampling. It also leaves every parameter its meaning, and a
seed its tokens.

A position from which no token can be drawn ends the verification before it. The next step comes to
the same position first, and its request fails then, as without drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.outputs import LogprobsLists

from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.vllm.host_sampling import Drawn, HostSampler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


def count_rows(requests: Sequence[Request]) -> int:
    """Return the number of rows of logits that requests have in a step."""
    return sum(1 + len(request.drafts) for request in requests)


def accepts_last(request: Request, position: int, max_model_len: int) -> bool:
    """Return whether the token just drawn at ``position`` was drafted, and another one follows.

    Nothing is drawn behind the end of a request: it may not fail there any more.
    """
    drafts = request.drafts
    if position >= len(drafts) or request.output[-1] != drafts[position]:
        return False
    params, token = request.params, request.output[-1]
    return not (
        token == params.eos_token_id
        or token in (params.stop_token_ids or ())
        or (params.max_tokens is not None and len(request.output) >= params.max_tokens)
        or request.num_tokens >= max_model_len
    )


def verify_on_host(
    host: HostSampler,
    copy_rows: Callable[[list[int]], torch.Tensor],
    scheduler_output: SchedulerOutput,
    grammar: GrammarOutput | None,
) -> tuple[list[str], list[list[int]], LogprobsLists | None]:
    """Draw the tokens of the batch of vLLM's sampler and append them to its requests.

    Args:
        host: its batch is drawn.
        copy_rows: returns a new copy of rows of the logits, ``[b, V]``.
        scheduler_output: of the step.
        grammar: the step's masks of structured output.

    Returns:
        Ids of the requests; the tokens of each, none for a request that failed;
        log-probabilities, as vLLM's scheduler cuts them.
    """
    requests = host.requests
    starts: dict[str, int] = {}
    rows = 0
    for request in requests:
        starts[request.req_id] = rows
        rows += 1 + len(request.drafts)
    masks = _Masks(scheduler_output, grammar)
    tokens: dict[str, list[int]] = {request.req_id: [] for request in requests}
    logprobs = _Logprobs()
    going, position = requests, 0
    while going:

        def copy_scores(some: Sequence[Request], position: int = position) -> torch.Tensor:
            return copy_rows([starts[request.req_id] + position for request in some])

        drawn = host.draw(copy_scores, going, masks.at(position, going), again=position > 0)
        logprobs.add(drawn)
        for req_id, token in drawn.tokens.items():
            tokens[req_id].append(token)
        going = [
            request
            for request in going
            if request.req_id in drawn.tokens
            and accepts_last(request, position, host.max_model_len)
        ]
        position += 1
    order = [request.req_id for request in requests]
    every = len(scheduler_output.num_scheduled_tokens)
    return order, list(tokens.values()), logprobs.lists(order, every)


class _Masks:
    """The masks of structured output, by position.

    The scheduler sends ``1 + drafts`` rows for each of its requests, of the drafts that it
    scheduled: there may be more than those that are verified.
    """

    def __init__(self, scheduler_output: SchedulerOutput, grammar: GrammarOutput | None) -> None:
        self._grammar = grammar
        self._starts: dict[str, int] = {}
        self._drafts = scheduler_output.scheduled_spec_decode_tokens
        if grammar is not None:
            row = 0
            for req_id in grammar.structured_output_request_ids:
                self._starts[req_id] = row
                row += 1 + len(self._drafts.get(req_id, ()))

    def at(self, position: int, requests: Sequence[Request]) -> GrammarOutput | None:
        """Return one row for each of ``requests`` with structured output; None without any."""
        if self._grammar is None or (not self._drafts and not position):
            return self._grammar
        req_ids = [request.req_id for request in requests if request.req_id in self._starts]
        if not req_ids:
            return None
        rows = [self._starts[req_id] + position for req_id in req_ids]
        return GrammarOutput(req_ids, self._grammar.grammar_bitmask[rows])


class _Logprobs:
    """The log-probabilities of a step, collected by position and handed on by request."""

    def __init__(self) -> None:
        self._parts: list[LogprobsLists] = []
        # Request id → its rows, each as (part, row).
        self._rows: dict[str, list[tuple[int, int]]] = {}

    def add(self, drawn: Drawn) -> None:
        """Add a position."""
        if drawn.logprobs is not None:
            for req_id, row in drawn.rows.items():
                self._rows.setdefault(req_id, []).append((len(self._parts), row))
            self._parts.append(drawn.logprobs.tolists())

    def lists(self, order: Sequence[str], every: int) -> LogprobsLists | None:
        """Return the rows of the requests, those of each together.

        Args:
            order: ids of the requests.
            every: number of requests of the step. vLLM's scheduler looks up the rows of those
                behind ``order``, too, and there are none.
        """
        if not self._rows:
            return None
        places = [self._rows.get(req_id, []) for req_id in order]
        if places == [[(0, row)] for row in range(len(places))]:
            return self._parts[0]
        ends = np.cumsum([0, *map(len, places)]).tolist()
        ends += ends[-1:] * (every - len(places))
        chosen = [place for rows in places for place in rows]
        ids, values, ranks = (
            np.concatenate([self._parts[part][field][row : row + 1] for part, row in chosen])
            for field in range(3)
        )
        return LogprobsLists(ids, values, ranks, ends)
