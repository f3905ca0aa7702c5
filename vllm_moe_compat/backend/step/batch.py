"""Who computes what in one step.

In: vLLM's ``Step``. Out: forward passes, each a padded batch of token ids with
the offsets and block tables of its rows.

A prompt's last token joins the decodes: the prefill pass computes what comes
before it, and so needs no logits at all (mlx evaluates only what is asked for),
and one pass of one token per request yields every row that is sampled. mlx-lm
splits a prompt the same way.

vLLM counts a block as cached from the moment that it schedules its tokens. So a
request may begin behind tokens that another one computes in the very same step;
it then goes into a later pass, and the other one's last token is computed before
that pass as well, if it is among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.vllm.scheduler_output import NewRequest, RunningRequest, Step

Int = npt.NDArray[np.int64]

# Padding up to this many tokens in a pass costs less than a second pass.
SMALL_PASS_TOKENS = 256


@dataclass(slots=True)
class Request:
    """A request that is alive: its tokens, its blocks, how far it is computed."""

    req_id: str
    prompt: list[int]
    params: Any  # vllm.SamplingParams
    blocks: list[list[int]]  # per KV group
    computed: int
    output: list[int] = field(default_factory=list)
    done: int = 0  # tokens computed when the last step ended

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, count: int) -> list[int]:
        """Token ids ``start … start + count``, across prompt and output."""
        n = len(self.prompt)
        if start + count <= n:
            return self.prompt[start : start + count]
        if start >= n:
            return self.output[start - n : start - n + count]
        return self.prompt[start:] + self.output[: start + count - n]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: row ``i`` computes ``lengths[i]`` tokens of ``requests[i]``.

    ``tokens [B, T]`` is padded on the right with token 0; ``offsets [B]`` is
    how many tokens each row has behind it.
    """

    requests: tuple[Request, ...]
    tokens: npt.NDArray[np.int32]
    offsets: Int
    lengths: Int

    @property
    def req_ids(self) -> list[str]:
        """Ids of the rows."""
        return [request.req_id for request in self.requests]

    def split(self) -> Iterator[tuple[int, Pass]]:
        """Each row as a pass of its own, with its number."""
        for row, length in enumerate(self.lengths):
            tokens = self.tokens[row : row + 1, :length]
            one = slice(row, row + 1)
            yield row, Pass(self.requests[one], tokens, self.offsets[one], self.lengths[one])

    def tables(self, group: int, block: int) -> Int:
        """Blocks of KV group ``group`` that hold the rows' tokens, ``[B, W]``.

        As wide as the longest row needs and padded with block 0.
        """
        need = -(-(self.offsets + self.lengths) // block)
        table = np.zeros((len(self.requests), int(need.max())), dtype=np.int64)
        for i, request in enumerate(self.requests):
            table[i, : need[i]] = request.blocks[group][: need[i]]
        return table


def make_pass(rows: Sequence[tuple[Request, int, int]]) -> Pass:
    """Build a pass from rows of (request, first position, number of tokens)."""
    lengths = np.asarray([count for _, _, count in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int32)
    for i, (request, start, count) in enumerate(rows):
        tokens[i, :count] = request.tokens(start, count)
    offsets = np.asarray([start for _, start, _ in rows], dtype=np.int64)
    return Pass(tuple(request for request, _, _ in rows), tokens, offsets, lengths)


class Batch:
    """All requests that are alive, and the passes of the current step."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self._hits: set[str] = set()  # who begins in this step behind cached tokens

    def update(self, step: Step) -> set[str]:
        """Apply a step's news; return the ids whose pages are no longer theirs.

        A request id may end and begin anew in one step: ends come first.
        """
        lost = set(step.finished)
        self._hits = {one.req_id for one in step.new if one.computed}
        self._hits |= {one.req_id for one in step.running if one.resumed and one.computed}
        for req_id in step.finished:
            self.requests.pop(req_id, None)
        for new in step.new:
            self.requests[new.req_id] = self._begin(new)
        for running in step.running:
            self._continue(self.requests[running.req_id], running)
            if running.resumed:
                lost.add(running.req_id)
        return lost

    @staticmethod
    def _begin(new: NewRequest) -> Request:
        blocks = [list(group) for group in new.blocks]
        return Request(new.req_id, new.prompt, new.params, blocks, new.computed)

    @staticmethod
    def _continue(request: Request, running: RunningRequest) -> None:
        request.computed = running.computed
        # Tokens beyond what the scheduler counts were discarded by it.
        del request.output[running.num_output :]
        if running.resumed:
            assert running.blocks is not None
            request.blocks = [list(group) for group in running.blocks]
        elif running.blocks is not None:
            for mine, new in zip(request.blocks, running.blocks, strict=True):
                mine.extend(new)

    def samples(self, req_id: str, scheduled: int) -> bool:
        """Whether this step reaches the end of what is known of a request."""
        request = self.requests[req_id]
        return request.computed + scheduled >= request.num_tokens

    def prefills(self, scheduled: dict[str, int], block_sizes: Sequence[int]) -> list[Pass]:
        """Passes for prompt tokens, without the last token of whoever samples.

        One pass, unless its rows differ so much in length that padding would
        more than double the work, or read what others of this step write.
        ``scheduled`` is in vLLM's order, ``block_sizes`` are by KV group.
        """
        turns, awaited = self._turns(scheduled, block_sizes)
        rows = []
        for req_id, count in scheduled.items():
            request = self.requests[req_id]
            count -= self.samples(req_id, count) and req_id not in awaited
            if count:
                rows.append((request, request.computed, count))
        rows.sort(key=lambda row: (turns[row[0].req_id], -row[2]))
        passes: list[list[tuple[Request, int, int]]] = []
        turn = 0
        for row in rows:
            same, turn = turns[row[0].req_id] == turn, turns[row[0].req_id]
            if passes and same:
                last = passes[-1]
                area = last[0][2] * (len(last) + 1)
                real = sum(count for _, _, count in last) + row[2]
                if area <= max(2 * real, SMALL_PASS_TOKENS):
                    last.append(row)
                    continue
            passes.append([row])
        return [make_pass(rows) for rows in passes]

    def _turns(
        self, scheduled: dict[str, int], block_sizes: Sequence[int]
    ) -> tuple[dict[str, int], set[str]]:
        """Of each request the turn at which what it begins behind is there.

        And the requests whose last token is part of that, to be computed twice. A
        state would not survive it, but vLLM shares none in the step that makes it.
        """
        turns, awaited = dict.fromkeys(scheduled, 0), set[str]()
        if self._hits.isdisjoint(scheduled):
            return turns, awaited
        writers: dict[tuple[int, int], tuple[str, bool]] = {}
        for req_id, count in scheduled.items():
            request = self.requests[req_id]
            for group, size in enumerate(block_sizes):
                begun = request.computed // size
                blocks = request.blocks[group][: -(-(request.computed + count) // size)]
                if req_id in self._hits:
                    for writer, last in (
                        writers[group, block]
                        for block in blocks[:begun]
                        if (group, block) in writers
                    ):
                        turns[req_id] = max(turns[req_id], turns[writer] + 1)
                        if last:
                            awaited.add(writer)
                for number, block in enumerate(blocks[begun:], start=begun + 1):
                    writers[group, block] = req_id, number == len(blocks)
        return turns, awaited

    def decodes(self, req_ids: Sequence[str], scheduled: dict[str, int]) -> Pass:
        """The pass of one token per request in ``req_ids``, which all sample."""
        rows = tuple(self.requests[req_id] for req_id in req_ids)
        ends = [r.computed + scheduled[r.req_id] for r in rows]
        # Each is its request's last token, or it would not sample.
        tokens = [[r.output[-1] if r.output else r.prompt[-1]] for r in rows]
        offsets = np.asarray(ends, dtype=np.int64) - 1
        return Pass(rows, np.asarray(tokens, dtype=np.int32), offsets, np.ones_like(offsets))
