"""A pass that verified drafts, until it is known which of them are right.

Keys and values of the wrong ones need no care: later tokens overwrite them, and until then a mask
hides them. A state is kept as after the right ones, and written to the pages of the block
boundaries that they went over, where prefix caching will look for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_moe_compat.backend.pages.states_by_position import StatesByPosition
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Pass


@dataclass(frozen=True, slots=True)
class Verified:
    """An evaluated pass.

    Attributes:
        work: the pass.
        positions: states after each token, per layer.
    """

    work: Pass
    positions: list[StatesByPosition]

    def keep(self, storage: LayerStorage, counts: Mapping[str, int]) -> None:
        """Keep the first ``counts[req_id]`` tokens of each row."""
        if not self.positions:
            return
        stay = [counts[req_id] for req_id in self.work.req_ids]
        storage.states.put_positions(self.work.req_ids, self.positions, stay)
        if storage.keep_boundaries:
            self._save_boundaries(storage, stay)

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
