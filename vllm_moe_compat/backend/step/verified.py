"""A pass that verified drafts, until it is known which of them are right.

Keys and values of the wrong ones need no care: later tokens overwrite them, and until then a mask
hides them. A state is kept as after the right ones, and written to the pages of the block
boundaries that they went over, where prefix caching will look for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.backend.pages.states_by_position import StatesByPosition
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Pass
from vllm_moe_compat.backend.step.graph import GraphBuilder


@dataclass(frozen=True, slots=True)
class Verified:
    """An evaluated pass.

    Attributes:
        work: the pass.
        positions: states after each token, per layer.
        finite: whether logits are finite, of all tokens of the rows, one row after the other.
    """

    work: Pass
    positions: list[StatesByPosition]
    finite: npt.NDArray[np.bool_]

    def keep(self, builder: GraphBuilder, counts: Mapping[str, int]) -> None:
        """Keep the first ``counts[req_id]`` tokens of each row."""
        stay = [counts[req_id] for req_id in self.work.req_ids]
        storage = builder.storage
        if self.positions:
            storage.states.put_positions(self.work.req_ids, self.positions, stay)
            if storage.keep_boundaries:
                self._save_boundaries(storage, stay)
        for row, count in self._discarded_nan(stay):
            self._clear(builder, row, count)

    def _save_boundaries(self, storage: LayerStorage, stay: Sequence[int]) -> None:
        block = storage.block_sizes[storage.states.groups[0]]
        offsets = self.work.offsets.tolist()
        crossed = [
            (row, end)
            for row, (offset, count) in enumerate(zip(offsets, stay, strict=True))
            for end in range(offset + 1, offset + count + 1)
            if end % block == 0
        ]
        tables = [self.work.requests[row].blocks for row, _ in crossed]
        blocks = storage.state_blocks(tables, [end for _, end in crossed])
        # Of several boundaries in one pass, vLLM has a block for the last one only.
        real = [i for i in range(len(crossed)) if all(found[i] for found in blocks.values())]
        storage.states.save_positions(
            self.positions,
            [crossed[i][0] for i in real],
            [crossed[i][1] - offsets[crossed[i][0]] for i in real],
            {group: [found[i] for i in real] for group, found in blocks.items()},
        )

    def _discarded_nan(self, stay: Sequence[int]) -> list[tuple[int, int]]:
        """Return row and number of the first discarded token, where one may have left NaN."""
        ends = np.cumsum(self.work.lengths).tolist()
        return [
            (row, count)
            for row, (end, count) in enumerate(zip(ends, stay, strict=True))
            if not self.finite[end - int(self.work.lengths[row]) + count : end].all()
        ]

    def _clear(self, builder: GraphBuilder, row: int, first: int) -> None:
        """Zero keys and values of a row's tokens from the number ``first`` of the pass on.

        A mask does not stop NaN.
        """
        one = slice(row, row + 1)
        rest = Pass(
            self.work.requests[one],
            self.work.tokens[one, first:],
            self.work.offsets[one] + first,
            self.work.lengths[one] - first,
        )
        pools = builder.storage.pools
        for layer, metadata in zip(builder.storage.layers, builder.metadata(rest), strict=True):
            if isinstance(layer, AttentionLayer) and metadata is not None:
                rows = metadata.rows(layer.planes * layer.kv_heads)
                pools[layer.index].clear_rows(rows, layer.row)
                mx.eval(pools[layer.index].pages)
