"""The requests of the engine, and the forward passes of one step.

A pass is a padded batch of token ids with the offsets and block tables of its rows. Prompts are
computed by prefill passes without their last token; that token joins the decodes. So prefill
passes need no logits (MLX evaluates only requested arrays), and one pass with one token per
request yields all rows that are sampled. mlx-lm splits prompts in the same way.

vLLM counts a block as cached from the moment that it schedules the block's tokens. A request may
therefore start behind a prefix that another request computes in the same step. It then goes into
a later pass, and if the prefix includes the other request's last token, that token is computed
before the later pass as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.step.schedule import NewRequest, RunningRequest, Schedule

Int = npt.NDArray[np.int64]

# Up to this many tokens, a padded pass is cheaper than two passes.
SMALL_PASS_TOKENS = 256

# Tokens of a row in one pass. Attention within a pass covers its whole square, half of which is
# masked, so a long chunk of a prompt is computed in several passes. On the CPU short ones are
# faster; elsewhere it is mlx-lm's default.
PASS_TOKENS_ON_CPU, PASS_TOKENS = 256, 2048


def most_tokens_of_a_row() -> int:
    """Return how many tokens of a row one pass computes at most."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return PASS_TOKENS_ON_CPU if on_cpu else PASS_TOKENS


@dataclass(slots=True)
class Request:
    """A request that has not ended.

    Attributes:
        req_id: vLLM's id.
        prompt: token ids.
        params: ``vllm.SamplingParams``.
        blocks: block ids, one list per KV group.
        computed: tokens computed before this step.
        output: generated token ids.
        done: tokens computed when the last step ended.
        failed: it has no answer any more; whatever its rows hold is right.
        drafts: proposed tokens after the last known one, which this step verifies.
    """

    req_id: str
    prompt: list[int]
    params: Any
    blocks: list[list[int]]
    computed: int
    output: list[int] = field(default_factory=list)
    done: int = 0
    failed: bool = False
    drafts: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, count: int) -> list[int]:
        """Return ``count`` token ids from ``start`` on, across prompt and output."""
        n = len(self.prompt)
        if start + count <= n:
            return self.prompt[start : start + count]
        if start >= n:
            return self.output[start - n : start - n + count]
        return self.prompt[start:] + self.output[: start + count - n]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: row ``i`` computes ``lengths[i]`` tokens of ``requests[i]``.

    Attributes:
        requests: of the rows.
        tokens: ``[B, T]`` int32, padded on the right with tokens of the same row: the values of
            another token may be NaN, which no mask stops.
        offsets: ``[B]``, tokens of each row computed before.
        lengths: ``[B]``, tokens of each row in this pass.
        verifies: the tokens of a row after its first are drafts, which may be discarded.
    """

    requests: tuple[Request, ...]
    tokens: npt.NDArray[np.int32]
    offsets: Int
    lengths: Int
    verifies: bool = False

    @property
    def req_ids(self) -> list[str]:
        """Ids of the rows."""
        return [request.req_id for request in self.requests]

    def split(self) -> Iterator[tuple[int, Pass]]:
        """Yield each row's number, and the row as a pass of its own."""
        for row, length in enumerate(self.lengths):
            tokens = self.tokens[row : row + 1, :length]
            one = slice(row, row + 1)
            yield (
                row,
                Pass(
                    self.requests[one],
                    tokens,
                    self.offsets[one],
                    self.lengths[one],
                    self.verifies,
                ),
            )

    def tables(self, group: int, block: int) -> Int:
        """Return the blocks of KV group ``group`` that hold the rows' tokens, ``[B, W]``.

        W is the number of blocks of the longest row; shorter rows are padded with block 0.
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
        tokens[i, count:] = tokens[i, 0]
    offsets = np.asarray([start for _, start, _ in rows], dtype=np.int64)
    return Pass(tuple(request for request, _, _ in rows), tokens, offsets, lengths)


Row = tuple[Request, int, int]


def _in_parts(rows: list[Row]) -> Iterator[list[Row]]:
    """Yield the rows of a pass in passes of ``most_tokens_of_a_row``."""
    most = most_tokens_of_a_row()
    for begin in range(0, max(count for _, _, count in rows), most):
        yield [
            (request, start + begin, min(count - begin, most))
            for request, start, count in rows
            if count > begin
        ]


class Batch:
    """All requests that have not ended, and the passes of the current step."""

    def __init__(self, token_rows: int | None = None) -> None:
        """``token_rows``: ids below it have a row in the model's embeddings; None for all."""
        self._token_rows = sys.maxsize if token_rows is None else token_rows
        self.requests: dict[str, Request] = {}
        self._prefix_hits: set[str] = set()

    def update(self, schedule: Schedule) -> set[str]:
        """Apply a schedule; return the ids of requests that no longer own their pages.

        An id may end and begin again in one step, so ends are applied first.
        """
        lost = set(schedule.finished)
        self._prefix_hits = {one.req_id for one in schedule.new if one.computed}
        self._prefix_hits |= {
            one.req_id for one in schedule.running if one.resumed and one.computed
        }
        for req_id in schedule.finished:
            self.requests.pop(req_id, None)
        for new in schedule.new:
            self.requests[new.req_id] = self._begin(new)
        for running in schedule.running:
            self._continue(self.requests[running.req_id], running)
            if running.resumed:
                lost.add(running.req_id)
        for req_id in schedule.scheduled:
            self.requests[req_id].drafts = self._drafts(schedule.drafts.get(req_id, ()))
        return lost

    def _drafts(self, proposed: Sequence[int]) -> list[int]:
        """Return the drafts before the first one that the model cannot compute."""
        return list(takewhile(lambda token: 0 <= token < self._token_rows, proposed))

    @staticmethod
    def _begin(new: NewRequest) -> Request:
        blocks = [list(group) for group in new.blocks]
        return Request(new.req_id, new.prompt, new.params, blocks, new.computed)

    @staticmethod
    def _continue(request: Request, running: RunningRequest) -> None:
        request.computed = running.computed
        # The scheduler discarded tokens beyond those that it counts.
        del request.output[running.num_output :]
        if running.resumed:
            assert running.blocks is not None
            request.blocks = [list(group) for group in running.blocks]
        elif running.blocks is not None:
            for known, added in zip(request.blocks, running.blocks, strict=True):
                known.extend(added)

    @property
    def behind_prefix(self) -> list[Request]:
        """The requests that start in this step behind a cached prefix."""
        return [self.requests[req_id] for req_id in self._prefix_hits]

    def samples(self, req_id: str, scheduled: int) -> bool:
        """Return whether the step computes a request's last known token, and so samples."""
        request = self.requests[req_id]
        return request.computed + scheduled >= request.num_tokens

    def partial_blocks(
        self, scheduled: dict[str, int], block_sizes: Mapping[int, int]
    ) -> dict[int, list[int]]:
        """Return, by KV group, the blocks that this step begins and no single pass fills.

        ``block_sizes``: group → tokens per block, of attention groups only.

        They have to be zeroed first: bits of an earlier owner may be NaN when read as keys, and
        a mask does not stop NaN. A request that samples never fills its last block in one pass,
        since its last token comes in a pass of its own, after others may have read the block.
        """
        partial: dict[int, list[int]] = {group: [] for group in block_sizes}
        most = most_tokens_of_a_row()
        for req_id, count in scheduled.items():
            request = self.requests[req_id]
            end = request.computed + count
            for group, size in block_sizes.items():
                # Between two passes of a long chunk, and at the end of the step.
                ends = [p for p in range(request.computed + most, end, most) if p % size]
                if end % size or end >= request.num_tokens:
                    ends.append(end)
                # Drafts that are not accepted leave a block partly filled.
                ends += range(end + 1, end + len(request.drafts) + 1)
                for last in dict.fromkeys((p - 1) // size for p in ends):
                    if last * size >= request.computed:
                        partial[group].append(request.blocks[group][last])
        return partial

    def prefills(self, scheduled: dict[str, int], block_sizes: Sequence[int]) -> list[Pass]:
        """Return the passes for prompt tokens, without the last token of requests that sample.

        There is one pass, unless padding would more than double its work, rows read blocks that
        other rows of this step write, or a row is long. ``scheduled`` is in vLLM's order;
        ``block_sizes`` are by KV group.
        """
        turns, needed_first = self._prefix_turns(scheduled, block_sizes)
        rows = []
        for req_id, count in scheduled.items():
            request = self.requests[req_id]
            # The last token is left to the decodes, unless another request's prefix includes it.
            count -= self.samples(req_id, count) and req_id not in needed_first
            if count:
                rows.append((request, request.computed, count))
        # Within a turn by length, so that rows of similar length share a pass.
        rows.sort(key=lambda row: (turns[row[0].req_id], -row[2]))
        passes: list[list[Row]] = []
        turn = 0
        for row in rows:
            same_turn, turn = turns[row[0].req_id] == turn, turns[row[0].req_id]
            if passes and same_turn:
                last = passes[-1]
                padded = last[0][2] * (len(last) + 1)
                real = sum(count for _, _, count in last) + row[2]
                if padded <= max(2 * real, SMALL_PASS_TOKENS):
                    last.append(row)
                    continue
            passes.append([row])
        return [make_pass(part) for rows in passes for part in _in_parts(rows)]

    def _prefix_turns(
        self, scheduled: dict[str, int], block_sizes: Sequence[int]
    ) -> tuple[dict[str, int], set[str]]:
        """Map each request to the turn in which its cached prefix is available.

        Turn 0 needs nothing from this step; turn n reads blocks written in turn n - 1 at the
        latest. vLLM schedules the writer of a block before its readers, so one walk in vLLM's
        order, which notes the writer of every block of this step, is enough.

        Also returns the requests whose last token is part of such a prefix. It is computed in
        the prefill pass and again in the decode pass. Keys and values do not change by that, but
        a recurrent state would advance twice; vLLM never shares a state in the step that
        computes it, so only attention is affected.
        """
        turns, needed_first = dict.fromkeys(scheduled, 0), set[str]()
        if self._prefix_hits.isdisjoint(scheduled):
            return turns, needed_first
        # (KV group, block) → (request that writes it, whether its last token is in the block).
        writers: dict[tuple[int, int], tuple[str, bool]] = {}
        for req_id, count in scheduled.items():
            request = self.requests[req_id]
            for group, size in enumerate(block_sizes):
                cached = request.computed // size
                blocks = request.blocks[group][: -(-(request.computed + count) // size)]
                if req_id in self._prefix_hits:
                    for block in blocks[:cached]:
                        if (group, block) not in writers:
                            continue  # computed in an earlier step
                        writer, has_last_token = writers[group, block]
                        turns[req_id] = max(turns[req_id], turns[writer] + 1)
                        if has_last_token:
                            needed_first.add(writer)
                for number, block in enumerate(blocks[cached:], start=cached + 1):
                    writers[group, block] = req_id, number == len(blocks)
        return turns, needed_first

    def decodes(self, req_ids: Sequence[str], scheduled: dict[str, int]) -> Pass:
        """Return the pass of the requests in ``req_ids``, all of which sample.

        A row has the request's last token and its drafts.
        """
        rows = tuple(self.requests[req_id] for req_id in req_ids)
        ends = [r.computed + scheduled[r.req_id] for r in rows]
        # A request samples only at its last token.
        known = [r.output[-1] if r.output else r.prompt[-1] for r in rows]
        lengths = np.asarray([1 + len(r.drafts) for r in rows], dtype=np.int64)
        width = int(lengths.max())
        tokens = np.empty((len(rows), width), dtype=np.int32)
        for i, request in enumerate(rows):
            tokens[i] = known[i]
            tokens[i, 1 : lengths[i]] = request.drafts
        offsets = np.asarray(ends, dtype=np.int64) - 1
        return Pass(rows, tokens, offsets, lengths, verifies=width > 1)
