"""The graph of one forward pass: the model's own code on pages and resident states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.pages import state_caches
from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.layers import AttentionLayer, has_nested_caches, nest_caches
from vllm_moe_compat.backend.pages.paged_kv import PagedKV
from vllm_moe_compat.backend.pages.state_pool import State
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
    """

    logits: mx.array
    pages: list[mx.array]
    states: list[State]
    given: list[mx.array] = field(default_factory=list)

    @property
    def written(self) -> list[mx.array]:
        """All arrays that the pass writes."""
        return self.pages + self.given + [part for state in self.states for part in state]


class GraphBuilder:
    """Builds the passes of one model."""

    def __init__(self, model: nn.Module, storage: LayerStorage) -> None:
        self.model, self.storage = model, storage
        self._pools = storage.distinct_pools
        self._nested = has_nested_caches(storage.layers)

    def metadata(self, work: Pass) -> list[AttentionMetadata | None]:
        """Return the metadata of each cache: one per KV group, one more per window in it.

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
                by_group[group] = AttentionMetadata(work.offsets, work.lengths, table, block)
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
    ) -> Graph:
        """Run the model's code on the current pools; this replaces their arrays.

        ``metadata``: as returned by ``metadata``; ``lengths [B]``: new tokens of each row.
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
        with_state = state_caches.make_caches(states, lengths)
        for stateful, cache in zip(storage.states.layers, with_state, strict=True):
            caches[stateful.index] = cache
        nested = nest_caches(storage.layers, caches) if self._nested else caches
        logits: mx.array = self.model(tokens, cache=nested)
        pages = [pool.pages for pool in self._pools]
        written = state_caches.new_states(with_state)
        return Graph(logits, pages, written, pipeline.given(self.model))
