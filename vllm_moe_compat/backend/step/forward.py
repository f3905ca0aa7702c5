"""A forward pass: built as MLX's graph, started, and waited for.

In: a ``Pass``. Out: logits; pages and states are what they are after it. Each
pass is evaluated before the next one is scheduled: MLX writes into a pool in
place only while nothing else holds it, so overlapping two passes would copy
whole pools.

Building a graph is another matter than scheduling it. While a decode pass runs,
the host would only wait, and building the next one takes it a millisecond or
two. So when every token of the batch is drawn in MLX, the pass that will most
likely come next (the same requests, one token on) is built then, on the tokens
that are being drawn, and kept aside; pools and states look as if it had not
been. If the next pass is that one, token for token and page for page, it is
evaluated as it is; otherwise it is dropped before anything is written. Such a pass
is handed back while it runs, and waited for before anything else happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.model.layers import AttentionLayer, Rows, nest, nested, rows_of
from vllm_moe_compat.backend.pages import state_caches as linear_attention
from vllm_moe_compat.backend.pages.paged_kv import AttentionStep, PagedKV
from vllm_moe_compat.backend.pages.state_pool import State
from vllm_moe_compat.backend.step.batch import Pass

if TYPE_CHECKING:
    from vllm_moe_compat.backend.vllm.runner import Memory


@dataclass(slots=True)
class _Graph:
    """A pass that is built and not evaluated.

    ``pages`` and ``states`` are what pools and resident states become by it.
    """

    logits: mx.array
    pages: list[mx.array]
    states: list[State]


@dataclass(slots=True)
class _Ahead:
    """The pass that was built for later, and what it was built on."""

    graph: _Graph
    work: Pass
    tokens: mx.array  # [B]
    pages: list[mx.array]
    states: list[State]
    blocks: list[list[list[int]]]  # of each row, the very lists


class Forward:
    """Runs passes of one model."""

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        self.model, self.memory = model, memory
        attention_hook.install(model)
        self._rows = rows_of(memory.layers)
        self._nested = nested(memory.layers)
        self._pools = memory.distinct_pools
        self._ahead: _Ahead | None = None
        self._running: list[mx.array] = []
        self.hits = 0  # passes that had been built ahead

    def forget(self) -> None:
        """Drop what was built ahead; before anyone writes to pools outside a pass."""
        self.wait()
        self._ahead = None

    @property
    def running(self) -> bool:
        """Whether a pass was started that nobody has waited for."""
        return bool(self._running)

    def wait(self) -> None:
        """Wait for the pass that runs, if one does; before the next is scheduled."""
        running, self._running = self._running, []
        mx.eval(running)

    def __call__(self, work: Pass, rows: Sequence[int]) -> mx.array:
        """Run one pass and evaluate it: pages, states, and the logits of ``rows``.

        Returns logits ``[len(rows), T, V]``; with no rows, the model's head is
        never computed. Rows that the model's code cannot take together run one
        by one.
        """
        if not self._apart(work):
            logits, kept = self._adopted(work)
            if len(rows) < len(work.requests):
                logits = logits[mx.array(np.asarray(rows, dtype=np.uint32))] if rows else logits[:0]
            mx.eval(kept, logits if rows else ())
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
        self, work: Pass, draw: Callable[[mx.array], mx.array | None], *, ahead: bool
    ) -> tuple[mx.array, mx.array | None]:
        """Run a pass of one token per row, and what ``draw`` draws from it.

        ``draw`` takes logits ``[B, V]`` and returns tokens. Returns both,
        evaluated; unless ``ahead``: then tokens of every row are drawn, the next
        pass is built on them, and what is returned is there after ``wait``.
        """
        if self._apart(work):
            logits = self(work, range(len(work.requests)))[:, -1]
            tokens = draw(logits)
            if tokens is not None:
                mx.eval(tokens)
            return logits, tokens
        logits, outputs = self._adopted(work)
        logits = logits[:, -1]
        tokens = draw(logits)
        outputs += [logits] if tokens is None else [logits, tokens]
        mx.async_eval(outputs)  # type: ignore[no-untyped-call]
        self._running = outputs
        if not ahead:
            self.wait()
        elif tokens is not None and not self._crosses(work):
            self._build_ahead(work, tokens)
        return logits, tokens

    def _apart(self, work: Pass) -> bool:
        if self._rows is Rows.PADDED or len(work.requests) == 1:
            return False
        return self._rows is Rows.SINGLE or bool((work.lengths != work.lengths[0]).any())

    def _adopted(self, work: Pass) -> tuple[mx.array, list[mx.array]]:
        """Logits of a pass, and what pools and states became by it; nothing is evaluated."""
        self.wait()
        graph = self._built_ahead(work)
        if graph is None:
            graph = self._build(work, mx.array(work.tokens))
        self._adopt(work, graph)
        return graph.logits, graph.pages + [part for state in graph.states for part in state]

    def _build(self, work: Pass, tokens: mx.array) -> _Graph:
        """Build a pass; pools and states take up what it makes of them."""
        memory = self.memory
        caches: list[Any] = [None] * len(memory.layers)
        steps: dict[int, AttentionStep] = {}
        windows: dict[tuple[int, int], AttentionStep] = {}
        for layer in memory.layers:
            if isinstance(layer, AttentionLayer):
                group = memory.groups[layer.index]
                if group not in steps:
                    block = memory.block_sizes[group]
                    table = work.tables(group, block)
                    steps[group] = AttentionStep(work.offsets, work.lengths, table, block)
                step = steps[group]
                if layer.window is not None:
                    key = (group, layer.window)
                    if key not in windows:
                        windows[key] = step.windowed(layer.window)
                    step = windows[key]
                pool = memory.pools[layer.index]
                caches[layer.index] = PagedKV(layer, pool, step, asked=layer.direct)
        held = self._state_caches(work)
        for stateful, cache in zip(memory.states.layers, held, strict=True):
            caches[stateful.index] = cache
        given = nest(memory.layers, caches) if self._nested else caches
        logits: mx.array = self.model(tokens, cache=given)
        pages = [pool.pages for pool in self._pools]
        return _Graph(logits, pages, linear_attention.new_states(held))

    def _state_caches(self, work: Pass) -> list[Any]:
        states = self.memory.states
        if not states.layers:
            return []
        behind = [int(offset) for offset in work.offsets]
        blocks = self.memory.state_blocks(work.requests, behind)
        taken = states.take_out(work.req_ids, behind, blocks)
        return linear_attention.make_caches(taken, work.lengths)

    def _adopt(self, work: Pass, graph: _Graph) -> None:
        """Make pools and states what ``graph`` makes of them."""
        for pool, pages in zip(self._pools, graph.pages, strict=True):
            pool.pages = pages
        if graph.states:
            self.memory.states.put_in(work.req_ids, graph.states)

    def _crosses(self, work: Pass) -> bool:
        """Whether someone's next token begins a block, which is not known yet."""
        ends = work.offsets + work.lengths
        return any(bool((ends % size == 0).any()) for size in self.memory.block_sizes)

    def _build_ahead(self, work: Pass, tokens: mx.array) -> None:
        """Build the pass after ``work``, and leave pools and states as they are."""
        states = self.memory.states
        pages = [pool.pages for pool in self._pools]
        next_work = replace(work, offsets=work.offsets + 1)
        before = states.resident_states(work.req_ids)
        graph = self._build(next_work, tokens[:, None])
        for pool, old in zip(self._pools, pages, strict=True):
            pool.pages = old
        if before:
            states.put_in(work.req_ids, before)
        blocks = [request.blocks for request in work.requests]
        self._ahead = _Ahead(graph, next_work, tokens, pages, before, blocks)

    def _built_ahead(self, work: Pass) -> _Graph | None:
        """The graph of ``work`` if it was built ahead; it is let go of in any case."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or not self._is(ahead, work):
            return None
        if ahead.states:
            self.memory.states.take_out(work.req_ids, [1] * len(work.requests), {})
        self.hits += 1
        return ahead.graph

    def _is(self, ahead: _Ahead, work: Pass) -> bool:
        """Whether ``work``, on the pools and states of now, is what was built."""
        states = self.memory.states.resident_states(work.req_ids)
        return (
            len(work.requests) == len(ahead.work.requests)
            and all(a is b for a, b in zip(work.requests, ahead.work.requests, strict=True))
            and work.tokens.shape[1] == 1
            and np.array_equal(work.offsets, ahead.work.offsets)
            and np.array_equal(work.tokens[:, 0], np.array(ahead.tokens))
            and all(a.pages is b for a, b in zip(self._pools, ahead.pages, strict=True))
            and (states is ahead.states or not (states or ahead.states))
            # Tables only grow, and these rows' tokens did not begin a block; a request that
            # was preempted and resumed has another list.
            and all(
                request.blocks is blocks
                for request, blocks in zip(work.requests, ahead.blocks, strict=True)
            )
        )
