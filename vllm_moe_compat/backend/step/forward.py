"""Forward passes: building MLX's graph, scheduling it and waiting for it.

``Forward`` runs a ``Pass``, returns its logits and leaves pages and states as they are after it.
Each pass is evaluated before the next one is scheduled: MLX writes into a pool in place only
while nothing else references it, so two passes in flight would copy whole pools.

Building a graph schedules nothing, and takes the host a millisecond or two. So while a decode
pass runs, the host builds the next one: the same requests, one token further, on the token arrays
that are still being computed. That is possible if every token of the batch is drawn in MLX, and
if no request starts a new block, whose id is not known yet. Building replaces the pools' arrays
and the resident states, so both are restored afterwards; they must look as if nothing had been
built. If the next step asks for exactly that pass (same requests, tokens, blocks, pools and
states), the graph is evaluated as it is. Otherwise it is discarded before anything is written,
since a graph that references a pool would force the next write to copy it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.pages import state_caches
from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.layers import (
    AttentionLayer,
    Batching,
    batching_of,
    has_nested_caches,
    nest_caches,
)
from vllm_moe_compat.backend.pages.paged_kv import PagedKV
from vllm_moe_compat.backend.pages.state_pool import State
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Pass


@dataclass(slots=True)
class _Graph:
    """A pass that is built and not evaluated.

    Attributes:
        logits: ``[B, T, V]``.
        pages: arrays of all pools after the pass.
        states: resident states of its requests after the pass, per layer.
    """

    logits: mx.array
    pages: list[mx.array]
    states: list[State]


@dataclass(slots=True)
class _NextPass:
    """A pass built early, and everything that its graph depends on.

    Attributes:
        graph: of the pass.
        work: the pass; its token ids are those of the pass before, and not used.
        tokens: ``[B]``, the token arrays that the graph was built on.
        pages: arrays of all pools before the pass.
        states: resident states of its requests before the pass, per layer.
        blocks: block lists of each row, compared by identity.
    """

    graph: _Graph
    work: Pass
    tokens: mx.array
    pages: list[mx.array]
    states: list[State]
    blocks: list[list[list[int]]]


class Forward:
    """Runs the forward passes of one model."""

    def __init__(self, model: nn.Module, storage: LayerStorage) -> None:
        self.model, self.storage = model, storage
        # Also removed when this object is collected without ``close``, as after a failed start.
        self._remove_hook = weakref.finalize(self, attention_hook.install(model))
        self._batching = batching_of(storage.layers)
        self._nested = has_nested_caches(storage.layers)
        self._pools = storage.distinct_pools
        self._next: _NextPass | None = None
        self._running: list[mx.array] = []
        self.hits = 0  # passes that had been built early and were used

    def close(self) -> None:
        """Wait for the running pass and remove the attention hook; no pass can run afterwards."""
        self.discard_next()
        self._remove_hook()

    def discard_next(self) -> None:
        """Discard the pass built early; required before any write to pools outside a pass."""
        self.wait()
        self._next = None

    @property
    def running(self) -> bool:
        """Whether a pass was scheduled that was not waited for."""
        return bool(self._running)

    def wait(self) -> None:
        """Wait for the running pass, if there is one."""
        running, self._running = self._running, []
        mx.eval(running)

    def __call__(self, work: Pass, rows: Sequence[int]) -> mx.array:
        """Run a pass and evaluate its pages, its states and the logits of ``rows``.

        Rows that the model's code cannot take together run one by one.

        Returns:
            Logits ``[len(rows), T, V]``. Without rows, the model's head is never computed.
        """
        if not self._must_split(work):
            logits, written = self._begin(work)
            if len(rows) < len(work.requests):
                logits = logits[mx.array(np.asarray(rows, dtype=np.uint32))] if rows else logits[:0]
            mx.eval(written, logits if rows else ())
            return logits
        found = [self(part, [0] if row in rows else []) for row, part in work.split()]
        wanted = [found[row] for row in rows]
        if not wanted:
            return found[0]
        longest = max(logits.shape[1] for logits in wanted)
        return mx.concatenate(
            [mx.pad(x, [(0, 0), (0, longest - x.shape[1]), (0, 0)]) for x in wanted]
        )

    def decode(
        self, work: Pass, draw: Callable[[mx.array], mx.array | None], *, build_next: bool
    ) -> tuple[mx.array, mx.array | None]:
        """Run a pass of one token per row, and draw tokens in the same evaluation.

        Args:
            work: the pass.
            draw: takes logits ``[B, V]`` and returns token arrays ``[B']``, or None.
            build_next: ``draw`` yields a token for every row, and the pass is not waited for:
                the next one is built while it runs.

        Returns:
            Logits ``[B, V]`` and tokens; with ``build_next`` valid only after ``wait``.
        """
        if self._must_split(work):
            logits = self(work, range(len(work.requests)))[:, -1]
            tokens = draw(logits)
            if tokens is not None:
                mx.eval(tokens)
            return logits, tokens
        logits, outputs = self._begin(work)
        logits = logits[:, -1]
        tokens = draw(logits)
        outputs += [logits] if tokens is None else [logits, tokens]
        mx.async_eval(outputs)  # type: ignore[no-untyped-call]
        self._running = outputs
        if not build_next:
            self.wait()
        elif tokens is not None and not self._next_token_begins_block(work):
            self._build_next(work, tokens)
        return logits, tokens

    def _must_split(self, work: Pass) -> bool:
        """Return whether the model's code cannot take the rows of ``work`` together."""
        if self._batching is Batching.PADDED or len(work.requests) == 1:
            return False
        if self._batching is Batching.SINGLE_SEQUENCE:
            return True
        return bool((work.lengths != work.lengths[0]).any())

    def _begin(self, work: Pass) -> tuple[mx.array, list[mx.array]]:
        """Return the logits of a pass, and all arrays that it writes; nothing is evaluated."""
        self.wait()
        graph = self._take_next(work)
        if graph is None:
            graph = self._build(work, mx.array(work.tokens))
        self._commit(work, graph)
        return graph.logits, graph.pages + [part for state in graph.states for part in state]

    def _build(self, work: Pass, tokens: mx.array) -> _Graph:
        """Build a pass; this replaces the pools' arrays and takes out its requests' states."""
        storage = self.storage
        caches: list[Any] = [None] * len(storage.layers)
        # One metadata per KV group, and one more per sliding window in it.
        by_group: dict[int, AttentionMetadata] = {}
        by_window: dict[tuple[int, int], AttentionMetadata] = {}
        for layer in storage.layers:
            if isinstance(layer, AttentionLayer):
                group = storage.groups[layer.index]
                if group not in by_group:
                    block = storage.block_sizes[group]
                    table = work.tables(group, block)
                    by_group[group] = AttentionMetadata(work.offsets, work.lengths, table, block)
                metadata = by_group[group]
                if layer.window is not None:
                    key = (group, layer.window)
                    if key not in by_window:
                        by_window[key] = metadata.with_window(layer.window)
                    metadata = by_window[key]
                caches[layer.index] = PagedKV(
                    layer,
                    storage.pools[layer.index],
                    metadata,
                    attends_itself=layer.attends_itself,
                )
        with_state = self._state_caches(work)
        for stateful, cache in zip(storage.states.layers, with_state, strict=True):
            caches[stateful.index] = cache
        nested = nest_caches(storage.layers, caches) if self._nested else caches
        logits: mx.array = self.model(tokens, cache=nested)
        pages = [pool.pages for pool in self._pools]
        return _Graph(logits, pages, state_caches.new_states(with_state))

    def _state_caches(self, work: Pass) -> list[Any]:
        states = self.storage.states
        if not states.layers:
            return []
        computed = [int(offset) for offset in work.offsets]
        blocks = self.storage.state_blocks([r.blocks for r in work.requests], computed)
        taken = states.take_out(work.req_ids, computed, blocks)
        return state_caches.make_caches(taken, work.lengths)

    def _commit(self, work: Pass, graph: _Graph) -> None:
        """Make pools and resident states those after ``graph``."""
        for pool, pages in zip(self._pools, graph.pages, strict=True):
            pool.pages = pages
        if graph.states:
            self.storage.states.put_in(work.req_ids, graph.states)

    def _next_token_begins_block(self, work: Pass) -> bool:
        """Return whether some row's next token needs a block that is not assigned yet."""
        ends = work.offsets + work.lengths
        return any(bool((ends % size == 0).any()) for size in self.storage.block_sizes)

    def _build_next(self, work: Pass, tokens: mx.array) -> None:
        """Build the pass after ``work``, and restore pools and states."""
        states = self.storage.states
        pages = [pool.pages for pool in self._pools]
        next_work = replace(work, offsets=work.offsets + 1)
        before = states.resident_states(work.req_ids)
        graph = self._build(next_work, tokens[:, None])
        for pool, current in zip(self._pools, pages, strict=True):
            pool.pages = current
        if before:
            states.put_in(work.req_ids, before)
        blocks = [request.blocks for request in work.requests]
        self._next = _NextPass(graph, next_work, tokens, pages, before, blocks)

    def _take_next(self, work: Pass) -> _Graph | None:
        """Return the graph of ``work`` if it was built early; drop the reference in any case."""
        built, self._next = self._next, None
        if built is None or not self._matches(built, work):
            return None
        if built.states:
            # Already part of the graph; taken out so that ``_commit`` can put in the new ones.
            self.storage.states.take_out(work.req_ids, [1] * len(work.requests), {})
        self.hits += 1
        return built.graph

    def _matches(self, built: _NextPass, work: Pass) -> bool:
        """Return whether ``work``, on the current pools and states, is the pass that was built.

        Arrays and requests are compared by identity: an equal copy would mean that something
        was written in between.
        """
        states = self.storage.states.resident_states(work.req_ids)
        return (
            len(work.requests) == len(built.work.requests)
            and all(a is b for a, b in zip(work.requests, built.work.requests, strict=True))
            and work.tokens.shape[1] == 1
            and np.array_equal(work.offsets, built.work.offsets)
            and np.array_equal(work.tokens[:, 0], np.array(built.tokens))
            and all(a.pages is b for a, b in zip(self._pools, built.pages, strict=True))
            and (states is built.states or not (states or built.states))
            # Block lists only grow, and no row started a block, so the same list has the same
            # blocks; a request that was preempted and resumed has a new list.
            and all(
                request.blocks is blocks
                for request, blocks in zip(work.requests, built.blocks, strict=True)
            )
        )
