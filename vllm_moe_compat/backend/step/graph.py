"""The graph of one forward pass: the model's own code on pages and resident states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.model.hidden_states import HiddenStates
from vllm_moe_compat.backend.model.latent_by_token import LatentByToken
from vllm_moe_compat.backend.model.state_recording import StateRecording
from vllm_moe_compat.backend.pages import decode_attention, state_caches
from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.layers import AttentionLayer, has_nested_caches, nest_caches
from vllm_moe_compat.backend.pages.paged_kv import PagedKV
from vllm_moe_compat.backend.pages.state_pool import State
from vllm_moe_compat.backend.pages.states_by_position import StatesByPosition
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Pass
from vllm_moe_compat.ranks import pipeline


@dataclass(slots=True)
class Graph:
    """A pass that is built and not evaluated.

    Attributes:
        logits: ``[B, T, V]``.
        pages: arrays of all pools after the pass.
        states: resident states of its requests after the pass, per layer.
        given: what the pass gives to the next rank of a pipeline.
        positions: states after each token, per layer, of a pass that verifies drafts; else empty.
        hidden: ``[B, T, H]``, what prediction heads continue from; None if nobody asks for it.
    """

    logits: mx.array
    pages: list[mx.array]
    states: list[State]
    given: list[mx.array] = field(default_factory=list)
    positions: list[StatesByPosition] = field(default_factory=list)
    hidden: mx.array | None = None

    @property
    def written(self) -> list[mx.array]:
        """All arrays that the pass writes."""
        states = [part for state in self.states for part in state]
        states += [part for layer in self.positions for part in layer.held]
        hidden = [] if self.hidden is None else [self.hidden]
        return self.pages + self.given + states + hidden


class GraphBuilder:
    """Builds the passes of one model.

    Attributes:
        hidden: takes the hidden states out of passes; None to leave them there.
    """

    def __init__(self, model: nn.Module, storage: LayerStorage) -> None:
        self.model, self.storage = model, storage
        self._pools = storage.distinct_pools
        self._nested = has_nested_caches(storage.layers)
        self.hidden: HiddenStates | None = None
        self._latent = LatentByToken(model)

    def metadata(self, work: Pass) -> list[AttentionMetadata | None]:
        """Return the metadata of each cache: one per KV group, one more per window in it.

        Tokens that verify drafts attend one by one where attention of one token is computed on
        the pool: the result has the bits of a pass without drafts, and nothing is copied.

        Caches of states have None.
        """
        storage = self.storage
        found: list[AttentionMetadata | None] = [None] * len(storage.layers)
        by_group: dict[int, AttentionMetadata] = {}
        by_window: dict[tuple[int, int], AttentionMetadata] = {}
        for layer in storage.layers:
            if not isinstance(layer, AttentionLayer):
                continue
            group = storage.groups[layer.index]
            if group not in by_group:
                block = storage.block_sizes[group]
                table = work.tables(group, block)
                whole = AttentionMetadata(
                    work.offsets, work.lengths, table, block, verifies=work.verifies
                )
                by_token = work.verifies and decode_attention.computes_on_pool(layer.dtype)
                by_group[group] = whole.attending_by_token() if by_token else whole
            metadata = by_group[group]
            if layer.window is not None:
                key = (group, layer.window)
                if key not in by_window:
                    by_window[key] = metadata.with_window(layer.window)
                metadata = by_window[key]
            found[layer.index] = metadata
        return found

    def take_states(self, work: Pass) -> list[State]:
        """Remove and return the resident states of the rows, per layer."""
        states = self.storage.states
        if not states.layers:
            return []
        computed = [int(offset) for offset in work.offsets]
        blocks = self.storage.state_blocks([r.blocks for r in work.requests], computed)
        return states.take_out(work.req_ids, computed, blocks)

    def build(
        self,
        tokens: mx.array,
        metadata: Sequence[Any],
        states: list[State],
        lengths: npt.NDArray[np.int64],
        recording: StateRecording | None = None,
    ) -> Graph:
        """Run the model's code on the current pools; this replaces their arrays.

        Args:
            tokens: ``[B, T]``.
            metadata: as returned by ``metadata``.
            states: of the rows, per layer.
            lengths: ``[B]``, new tokens of each row.
            recording: keeps the states after each token; None to keep the last ones.
        """
        storage = self.storage
        caches: list[Any] = [None] * len(storage.layers)
        for layer in storage.layers:
            if isinstance(layer, AttentionLayer):
                caches[layer.index] = PagedKV(
                    layer,
                    storage.pools[layer.index],
                    metadata[layer.index],
                    attends_itself=layer.attends_itself,
                )
        make_caches = recording.caches if recording else state_caches.make_caches
        with_state = make_caches(states, lengths)
        for stateful, cache in zip(storage.states.layers, with_state, strict=True):
            caches[stateful.index] = cache
        nested = nest_caches(storage.layers, caches) if self._nested else caches
        verifies = any(m is not None and m.verifies for m in metadata)
        with (
            self._latent.during() if verifies else nullcontext(),
            recording.during() if recording else nullcontext(),
            self.hidden.during() if self.hidden else nullcontext() as taken,
        ):
            logits: mx.array = self.model(tokens, cache=nested)
        logits = _nan_where_broken(logits, caches)
        graph = Graph(logits, [pool.pages for pool in self._pools], [], pipeline.given(self.model))
        if recording:
            graph.positions = recording.by_position(with_state)
        else:
            graph.states = state_caches.new_states(with_state)
        if taken is not None:
            graph.hidden = taken.take()
        return graph


def _nan_where_broken(logits: mx.array, caches: Sequence[Any]) -> mx.array:
    """Return the logits ``[B, T, V]`` of tokens whose keys or values were not finite as NaN."""
    broken = [cache.broken for cache in caches if isinstance(cache, PagedKV)]
    found = [one for one in broken if one is not None]
    if not found:
        return logits
    anywhere = mx.any(mx.stack(found), axis=0)[..., None]
    return mx.where(anywhere, mx.array(float("nan"), dtype=logits.dtype), logits)
