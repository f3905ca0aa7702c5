"""Passes of a model's prediction heads over the pages of its requests.

Position ``i`` of the heads takes token ``i + 1`` and the target's hidden state at ``i``. So their
keys and values lie in the same blocks and slots as the target's, in pages of their own layers.

``write`` runs the heads over positions whose next tokens are known, for their keys and values
alone: no logits are computed. ``draft`` does that too, draws the likeliest token after the last
position of each row, and goes on from there, one token per pass, on the heads' own hidden states.
Those passes write to slots of tokens that may be discarded; later passes of the same positions
overwrite them. The whole chain is one graph: tokens stay on the device until all drafts are
there. Every read of a page comes before the chain's next write to it, so no pool is copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.model.prediction_heads import PredictionHeads
from vllm_moe_compat.backend.pages.layers import (
    AttentionLayer,
    Batching,
    batching_of,
    has_nested_caches,
    nest_caches,
)
from vllm_moe_compat.backend.pages.paged_kv import PagedKV
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Pass, Request
from vllm_moe_compat.backend.step.graph import GraphBuilder


@dataclass(frozen=True, slots=True)
class HeadRow:
    """Consecutive positions of one request, whose next tokens are known.

    Attributes:
        request: which has the tokens.
        start: first position.
        hidden: ``[T, H]``, the target's hidden states at ``start …``.
    """

    request: Request
    start: int
    hidden: mx.array

    @property
    def length(self) -> int:
        """Number of positions."""
        return int(self.hidden.shape[0])

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + self.length

    def split(self, length: int) -> tuple[HeadRow, HeadRow]:
        """Return the first ``length`` positions, and the others."""
        first = replace(self, hidden=self.hidden[:length])
        return first, replace(self, start=self.start + length, hidden=self.hidden[length:])


class HeadPasses:
    """Runs the passes of one model's prediction heads."""

    def __init__(self, heads: PredictionHeads, storage: LayerStorage, token_rows: int) -> None:
        """Hook the heads' attention.

        Args:
            heads: of the model.
            storage: of the heads' layers.
            token_rows: token ids that the embeddings have rows for; no other one is drafted.
        """
        self.heads, self.storage, self._token_rows = heads, storage, token_rows
        # Called before pages are written: nothing else may hold the pools.
        self.before_write: Callable[[], None] = lambda: None
        self._remove_hook = weakref.finalize(self, attention_hook.install(heads))
        self._one_by_one = batching_of(storage.layers) is Batching.SINGLE_SEQUENCE
        self._metadata = GraphBuilder(heads, storage).metadata
        self._nested = has_nested_caches(storage.layers)
        self._pools = storage.distinct_pools

    def close(self) -> None:
        """Remove the attention hook and let go of the heads; no pass can run afterwards."""
        self._remove_hook()
        del self.heads, self._metadata

    def of(self, heads: PredictionHeads) -> HeadPasses:
        """Return the passes of other heads on the same pages."""
        made = HeadPasses(heads, self.storage, self._token_rows)
        made.before_write = self.before_write
        return made

    def write(self, rows: Sequence[HeadRow]) -> None:
        """Compute keys and values of the positions of ``rows``."""
        for together in self._together(rows):
            with self._building():
                self._zero_begun(together, [0] * len(together))
                self._first_pass(together, verifies=False)
            self._evaluate([])

    def outputs(self, rows: Sequence[HeadRow]) -> list[mx.array]:
        """Compute ``rows`` as ``draft`` does; return what the output head takes, ``[T, H]``."""
        found = []
        for together in self._together(rows):
            with self._building():
                self._zero_begun(together, [0] * len(together))
                normed, _ = self._first_pass(together, verifies=True)
            self._evaluate([normed])
            found += [part[: row.length] for part, row in zip(normed, together, strict=True)]
        return found

    def draft(self, rows: Sequence[HeadRow], counts: Sequence[int]) -> list[list[int]]:
        """Run over ``rows``, and draft ``counts[i]`` ≥ 1 tokens after those of each.

        The request's blocks must have slots for ``counts[i] - 1`` positions after the row's.
        """
        order = sorted(range(len(rows)), key=lambda row: -counts[row])
        drafts: list[list[int]] = [[] for _ in rows]
        for part in [[row] for row in order] if self._one_by_one else [order]:
            chain = self._chain([rows[row] for row in part], [counts[row] for row in part])
            for tokens in chain:
                for row, token in zip(part, tokens, strict=False):
                    drafts[row].append(token)
        return drafts

    def _together(self, rows: Sequence[HeadRow]) -> Iterator[Sequence[HeadRow]]:
        """Yield the rows that one pass takes."""
        if self._one_by_one:
            yield from ([row] for row in rows)
        elif rows:
            yield rows

    def _chain(self, rows: Sequence[HeadRow], counts: Sequence[int]) -> list[list[int]]:
        """Return the tokens of each step; rows with more of them come first."""
        with self._building():
            self._zero_begun(rows, [count - 1 for count in counts])
            normed, hidden = self._first_pass(rows, verifies=True)
            if normed.shape[1] > 1:
                last = np.asarray([row.length - 1 for row in rows], dtype=np.uint32)
                index = mx.array(last)[:, None, None]
                normed, hidden = (mx.take_along_axis(x, index, axis=1) for x in (normed, hidden))
            chain = [self._likeliest(normed)]
            for step in range(1, counts[0]):
                going_on = sum(count > step for count in counts)
                work = Pass(
                    tuple(row.request for row in rows[:going_on]),
                    np.zeros((going_on, 1), dtype=np.int32),
                    np.asarray([row.end + step - 1 for row in rows[:going_on]], dtype=np.int64),
                    np.ones(going_on, dtype=np.int64),
                    verifies=True,
                )
                normed, hidden = self._pass(work, chain[-1][:going_on], hidden[:going_on])
                chain.append(self._likeliest(normed))
        self._evaluate(chain)
        return [np.array(tokens).reshape(-1).tolist() for tokens in chain]

    def _likeliest(self, normed: mx.array) -> mx.array:
        """Return the likeliest token that has an embedding, ``[B, 1]``; any one after NaN."""
        logits = self.heads.logits(normed)
        tokens = mx.argmax(logits[..., : self._token_rows], axis=-1)
        return mx.minimum(tokens, self._token_rows - 1).astype(mx.int32)

    def _first_pass(self, rows: Sequence[HeadRow], *, verifies: bool) -> tuple[mx.array, mx.array]:
        """Build the pass over ``rows``, padded on the right with tokens of the same row.

        ``verifies``: as of ``Pass``; each token attends by itself, and NaN is stored as zeros.
        """
        lengths = np.asarray([row.length for row in rows], dtype=np.int64)
        steps = np.arange(int(lengths.max()))
        tokens = np.empty((len(rows), len(steps)), dtype=np.int32)
        hidden = []
        for i, row in enumerate(rows):
            tokens[i, : row.length] = row.request.tokens(row.start + 1, row.length)
            tokens[i, row.length :] = tokens[i, 0]
            padded = np.minimum(steps, row.length - 1).astype(np.uint32)
            whole = row.length == len(steps)
            hidden.append(row.hidden if whole else row.hidden[mx.array(padded)])
        # A token without an embedding ends its request in the next step.
        np.minimum(tokens, self._token_rows - 1, out=tokens)
        offsets = np.asarray([row.start for row in rows], dtype=np.int64)
        requests = tuple(row.request for row in rows)
        work = Pass(requests, tokens, offsets, lengths, verifies)
        stacked = mx.stack(hidden) if len(hidden) > 1 else hidden[0][None]
        return self._pass(work, mx.array(tokens), stacked)

    def _pass(self, work: Pass, tokens: mx.array, hidden: mx.array) -> tuple[mx.array, mx.array]:
        """Build a pass as ``heads.decode`` does; this replaces the arrays of the pools."""
        storage, caches = self.storage, []
        for layer, metadata in zip(storage.layers, self._metadata(work), strict=True):
            assert isinstance(layer, AttentionLayer)
            assert metadata is not None
            pool = storage.pools[layer.index]
            caches.append(PagedKV(layer, pool, metadata, attends_itself=layer.attends_itself))
        nested = nest_caches(storage.layers, caches) if self._nested else caches
        return self.heads.decode(tokens, hidden, nested)

    def _zero_begun(self, rows: Sequence[HeadRow], further: Sequence[int]) -> None:
        """Zero the blocks that the rows begin and the first pass does not fill.

        ``further``: positions of each row after those of the first pass. An earlier owner's bits
        may be NaN, which no mask stops.
        """
        for layer in self.storage.layers:
            group = self.storage.groups[layer.index]
            size = self.storage.block_sizes[group]
            begun = [
                row.request.blocks[group][number]
                for row, more in zip(rows, further, strict=True)
                for number in range(-(-row.start // size), -(-(row.end + more) // size))
                if (number + 1) * size > row.end
            ]
            self.storage.pools[layer.index].zero(begun)

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Put the pools back if a pass cannot be built."""
        self.before_write()
        before = [pool.pages for pool in self._pools]
        try:
            yield
        except BaseException:
            for pool, pages in zip(self._pools, before, strict=True):
                pool.pages = pages
            raise

    def _evaluate(self, tokens: list[mx.array]) -> None:
        mx.eval([pool.pages for pool in self._pools], tokens)
