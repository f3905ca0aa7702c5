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

Where experts are read from disk (``expert_reads``), building computes, so nothing is built early.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.model.hidden_states import HiddenStates
from vllm_moe_compat.backend.model.state_recording import StateRecording
from vllm_moe_compat.backend.pages.layers import Batching, batching_of
from vllm_moe_compat.backend.pages.state_pool import State
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Pass
from vllm_moe_compat.backend.step.compiled_decode import (
    CannotCompileError,
    CompiledDecode,
)
from vllm_moe_compat.backend.step.expert_reads import ExpertReads
from vllm_moe_compat.backend.step.graph import Graph, GraphBuilder
from vllm_moe_compat.backend.step.verified import Verified


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

    graph: Graph
    work: Pass
    tokens: mx.array
    pages: list[mx.array]
    states: list[State]
    blocks: list[list[list[int]]]


class Forward:
    """Runs the forward passes of one model."""

    def __init__(
        self,
        model: nn.Module,
        storage: LayerStorage,
        *,
        compiles: bool = False,
        recording: StateRecording | None = None,
    ) -> None:
        """Make the passes of a model.

        Args:
            model: loaded.
            storage: of its layers.
            compiles: decode passes may be compiled (``compiled_decode``).
            recording: of the states of passes that verify drafts; needed for models with states.
        """
        self.model, self.storage = model, storage
        # Also removed when this object is collected without ``close``, as after a failed start.
        self._remove_hook = weakref.finalize(self, attention_hook.install(model))
        self._batching = batching_of(storage.of_all_ranks)
        self._pools = storage.distinct_pools
        self._builder = GraphBuilder(model, storage)
        self.expert_reads = ExpertReads(model)
        self.compiled = CompiledDecode(self._builder, enabled=compiles)
        self._next: _NextPass | None = None
        self._running: list[mx.array] = []
        # The passes of ``verify``, until ``accept``.
        self._verified: list[Verified] = []
        self.recording = recording
        # Called before a pass is evaluated; whether it has logits.
        self.before_pass: Callable[[Pass, bool], None] = lambda work, logits: None
        self._hidden: list[tuple[Pass, mx.array]] = []
        self.hits = 0  # passes that had been built early and were used

    def close(self) -> None:
        """Wait for the running pass and remove the attention hook; no pass can run afterwards."""
        self.discard_next()
        self.compiled.close()
        self._remove_hook()

    def discard_next(self) -> None:
        """Discard the pass built early; required before any write to pools outside a pass."""
        self.wait()
        self._next = None

    def keep_hidden(self, hidden: HiddenStates) -> None:
        """Keep the hidden states of passes from now on, for ``take_hidden``."""
        self.discard_next()
        self._builder.hidden = hidden

    def take_hidden(self) -> list[tuple[Pass, mx.array]]:
        """Return the hidden states ``[B, T, H]`` of the passes since the last call.

        They are evaluated with their pass. Rows that were computed one by one come as passes of
        one row.
        """
        taken, self._hidden = self._hidden, []
        return taken

    @property
    def failed_rows(self) -> dict[int, Exception]:
        """Rows of the last pass for which an expert could not be read, and why."""
        return self.expert_reads.failed_rows

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
            self.before_pass(work, bool(rows))
            with self.expert_reads.during(work):
                logits, written = self._begin(work)
                if len(rows) < len(work.requests):
                    only = mx.array(np.asarray(rows, dtype=np.uint32))
                    logits = logits[only] if rows else logits[:0]
                mx.eval(written, logits if rows else ())
            return logits
        found, failed = [], dict[int, Exception]()
        for row, part in work.split():
            found.append(self(part, [0] if row in rows else []))
            for error in self.failed_rows.values():
                failed[row] = error
        self.expert_reads.failed_rows = failed
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
        self.before_pass(work, True)
        with self.expert_reads.during(work):
            logits, outputs = self._begin(work)
            logits = logits[:, -1]
            tokens = draw(logits)
            outputs += [logits] if tokens is None else [logits, tokens]
            if not build_next:
                mx.eval(outputs)
                return logits, tokens
            mx.async_eval(outputs)  # type: ignore[no-untyped-call]
        self._running = outputs
        if tokens is not None and self._can_build_next(work):
            self._build_next(work, tokens)
        return logits, tokens

    def verify(self, work: Pass) -> mx.array:
        """Run a pass that verifies drafts, and evaluate it; ``accept`` must follow.

        Returns:
            Logits ``[R, V]`` of all tokens of the rows, one row of the pass after the other.
        """
        self.discard_next()
        parts = list(work.split()) if self._must_split(work) else [(0, work)]
        found, failed = [], dict[int, Exception]()
        for first, part in parts:
            self.before_pass(part, True)
            with self.expert_reads.during(part):
                graph = self._build(part, mx.array(part.tokens), early=False)
                assert graph is not None
                self._commit(part, graph)
                flat = graph.logits.reshape(-1, graph.logits.shape[-1])
                real = np.arange(part.tokens.shape[1]) < part.lengths[:, None]
                if not real.all():
                    flat = flat[mx.array(np.flatnonzero(real).astype(np.uint32))]
                mx.eval(graph.written, flat)
            found.append(flat)
            self._verified.append(Verified(part, graph.positions))
            failed |= {first + row: error for row, error in self.failed_rows.items()}
        self.expert_reads.failed_rows = failed
        return found[0] if len(found) == 1 else mx.concatenate(found)

    def accept(self, counts: Mapping[str, int]) -> None:
        """Keep the states after the tokens that stay, of the pass of ``verify``.

        ``counts``: request id → tokens of its row that stay, the first one included.
        """
        verified, self._verified = self._verified, []
        for one in verified:
            one.keep(self.storage, counts)

    def _must_split(self, work: Pass) -> bool:
        """Return whether the model's code cannot take the rows of ``work`` together."""
        if self._batching is Batching.PADDED or len(work.requests) == 1:
            return False
        if self._batching is Batching.SINGLE_SEQUENCE:
            return True
        if work.verifies:
            return False  # Its states are recorded, which needs no skipped padding.
        return bool((work.lengths != work.lengths[0]).any())

    def _begin(self, work: Pass) -> tuple[mx.array, list[mx.array]]:
        """Return the logits of a pass, and all arrays that it writes; nothing is evaluated."""
        self.wait()
        graph = self._take_next(work) or self._build(work, mx.array(work.tokens), early=False)
        assert graph is not None
        self._commit(work, graph)
        return graph.logits, graph.written

    def _build(self, work: Pass, tokens: mx.array, *, early: bool) -> Graph | None:
        """Build a pass; this takes out its requests' states and may replace the pools' arrays.

        Returns None if the pass has to be evaluated as it is built, but is built ``early``.
        """
        metadata = self._builder.metadata(work)
        states = self._builder.take_states(work)
        single = work.tokens.shape[1] == 1 and not work.verifies
        compiles = single and not self.expert_reads.may_miss()
        inputs = self.compiled.inputs(metadata) if compiles else None
        if inputs is None:
            recording = self.recording if work.verifies else None
            return self._builder.build(tokens, metadata, states, work.lengths, recording)
        on_trial = self.compiled.on_trial(inputs)
        if on_trial and early:
            return None
        if not on_trial:
            try:
                return self.compiled.build(inputs, tokens, states)
            except CannotCompileError as error:
                self.compiled.give_up(error)
        plain = self._builder.build(tokens, metadata, states, work.lengths)
        if not on_trial:
            return plain
        self._evaluate(plain)
        try:
            compiled = self.compiled.build(inputs, tokens, states)
        except CannotCompileError as error:
            self.compiled.give_up(error)
        else:
            # It writes the same to the same places.
            self._evaluate(compiled)
            self.compiled.compare(inputs, plain, compiled)
        return replace(plain, pages=[pool.pages for pool in self._pools])

    def _evaluate(self, graph: Graph) -> None:
        """Make the pools those after ``graph``, which keeps no reference to them."""
        for pool, pages in zip(self._pools, graph.pages, strict=True):
            pool.pages = pages
        mx.eval(graph.logits, graph.written)
        graph.pages = []

    def _commit(self, work: Pass, graph: Graph) -> None:
        """Make pools and resident states those after ``graph``, and keep its hidden states."""
        if graph.hidden is not None:
            self._hidden.append((work, graph.hidden))
        for pool, pages in zip(self._pools, graph.pages, strict=True):
            pool.pages = pages
        if graph.states:
            self.storage.states.put_in(work.req_ids, graph.states)

    def _can_build_next(self, work: Pass) -> bool:
        """Return whether no row's next token needs a new block, and building computes nothing."""
        ends = work.offsets + work.lengths
        begins_block = any(bool((ends % size == 0).any()) for size in self.storage.block_sizes)
        return not begins_block and not self.expert_reads.may_miss()

    def _build_next(self, work: Pass, tokens: mx.array) -> None:
        """Build the pass after ``work``, and restore pools and states."""
        states = self.storage.states
        next_work = replace(work, offsets=work.offsets + 1)
        pages = [pool.pages for pool in self._pools]
        before = states.resident_states(work.req_ids)
        graph = self._build(next_work, tokens[:, None], early=True)
        for pool, current in zip(self._pools, pages, strict=True):
            pool.pages = current
        if before:
            states.put_in(work.req_ids, before)
        if graph is None:
            return
        blocks = [request.blocks for request in work.requests]
        self._next = _NextPass(graph, next_work, tokens, pages, before, blocks)

    def _take_next(self, work: Pass) -> Graph | None:
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
