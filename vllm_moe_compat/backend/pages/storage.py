"""Where every layer stores its keys, values and states: page pool, KV group and block size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer, StateLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.state_pool import StatePool

BlockTable = Sequence[Sequence[int]]
"""Block ids of one request by KV group."""


class LayerStorage:
    """Pools and states of all layers, as vLLM's KV cache plan assigns them."""

    def __init__(
        self,
        layers: Sequence[Layer],
        pools: dict[int, PagePool],
        groups: dict[int, int],
        block_sizes: Sequence[int],
        *,
        keep_boundaries: bool,
        of_all_ranks: Sequence[Layer] | None = None,
        heads: LayerStorage | None = None,
    ) -> None:
        """Take the plan.

        Args:
            layers: descriptions of all caches.
            pools: page pool by layer index; layers of different groups may share one.
            groups: KV group by layer index.
            block_sizes: tokens per block by KV group.
            keep_boundaries: states at block boundaries have to be saved, since prefix caching
                may come back to them.
            of_all_ranks: descriptions of the caches of all ranks of a pipeline, which make the
                same passes; None for ``layers``.
            heads: storage of the prediction heads' layers, which lie in the same blocks; None
                without heads.
        """
        self.heads = heads
        self._of_all_ranks = of_all_ranks
        self.layers, self.pools, self.groups = list(layers), pools, groups
        self.block_sizes = list(block_sizes)
        self.keep_boundaries = keep_boundaries
        stateful = [layer for layer in layers if isinstance(layer, StateLayer)]
        self.states = StatePool(
            stateful,
            [pools[layer.index] for layer in stateful],
            [groups[layer.index] for layer in stateful],
        )
        # KV group → tokens per block, of the groups of softmax layers.
        self.attention_block_sizes = {
            groups[layer.index]: self.block_sizes[groups[layer.index]]
            for layer in layers
            if isinstance(layer, AttentionLayer)
        }

    @property
    def of_all_ranks(self) -> Sequence[Layer]:
        """Descriptions of the caches of all ranks of a pipeline."""
        return self.layers if self._of_all_ranks is None else self._of_all_ranks

    @property
    def distinct_pools(self) -> list[PagePool]:
        """Every pool of these layers once."""
        return list({id(pool): pool for pool in self.pools.values()}.values())

    @property
    def all_pools(self) -> list[PagePool]:
        """Every pool of these layers and of the prediction heads once."""
        pools = self.distinct_pools + (self.heads.distinct_pools if self.heads else [])
        return list({id(pool): pool for pool in pools}.values())

    def release(self) -> None:
        """Give the memory of all pages and resident states back."""
        self.states.banks = []
        for pool in self.all_pools:
            pool.release()

    def allocate(self) -> None:
        """Make the pages of ``release`` anew, of zeros."""
        for pool in self.all_pools:
            pool.allocate()
            mx.eval(pool.pages)

    def state_blocks(
        self, tables: Sequence[BlockTable], tokens: Sequence[int]
    ) -> dict[int, list[int]]:
        """Return, by group of states, the block of each request's state after ``tokens``."""
        return {
            group: [
                table[group][max(count - 1, 0) // self.block_sizes[group]]
                for table, count in zip(tables, tokens, strict=True)
            ]
            for group in set(self.states.groups)
        }

    def zero_blocks(self, blocks: Mapping[int, Sequence[int]]) -> None:
        """Zero the pages of ``blocks`` (by KV group) in all layers of their group."""
        for layer in self.layers:
            self.pools[layer.index].zero(blocks.get(self.groups[layer.index], ()))
