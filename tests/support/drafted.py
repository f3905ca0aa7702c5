"""A model on pages of its own, with requests whose prompts are computed; drafts to verify."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from support import hybrid
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.model.dry_run import dry_run
from vllm_moe_compat.backend.pages.layers import StateLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.state_pool import StatePool
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Batch, Request
from vllm_moe_compat.backend.step.forward import Forward

BLOCK = 4
STEPS = 16
MOST = 5
"""Of drafts for one request, and 1."""


class Served:
    """A model on pages of its own, with requests whose prompts are computed."""

    def __init__(self, model: Any, lengths: tuple[int, ...] = (6, 11, 3)) -> None:
        """``lengths``: of the prompts."""
        layers = dry_run(model, describe(model)).layers
        pools, groups = {}, {}
        for layer in layers:
            stateful = isinstance(layer, StateLayer)
            if isinstance(layer, StateLayer):
                size, dtype = StatePool.bytes_per_sequence([layer]), mx.float32
            else:
                size, dtype = layer.token_bytes * BLOCK, layer.dtype
            pools[layer.index] = PagePool(128, size, dtype)
            groups[layer.index] = 0 if stateful else 1
        self.storage = LayerStorage(layers, pools, groups, [BLOCK] * 2, keep_boundaries=True)
        self.forward = Forward(model, self.storage)
        self.batch = Batch()
        draw, free = np.random.default_rng(0), list(range(1, 128))
        for number, length in enumerate(lengths):
            need = -(-(length + STEPS + MOST) // BLOCK)
            blocks = [[free.pop() for _ in range(need)] for _ in range(2)]
            prompt = draw.integers(1, 90, length).tolist()
            params = SimpleNamespace(prompt_logprobs=None, temperature=0)
            request = Request(f"r{number}", prompt, params, blocks, 0)
            self.batch.requests[request.req_id] = request
        for request in self.rows:
            hybrid.prefill(self.forward, [request])

    @property
    def rows(self) -> list[Request]:
        """The requests."""
        return list(self.batch.requests.values())

    def begin(self) -> dict[str, int]:
        """Begin a step in which every request is at its last token."""
        for row in self.rows:
            row.computed = row.num_tokens - 1
        scheduled = {row.req_id: 1 for row in self.rows}
        blocks = self.batch.partial_blocks(scheduled, self.storage.attention_block_sizes)
        self.storage.zero_blocks(blocks)
        return scheduled

    def states(self) -> dict[str, Any]:
        """The resident state of every request."""
        return {
            req_id: _row(bank.states, row)
            for bank in self.storage.states.banks
            for row, req_id in enumerate(bank.req_ids)
        }

    def page(self, request: Request, tokens: int) -> Any:
        """The state after so many tokens that was written to a page."""
        block = request.blocks[0][(tokens - 1) // BLOCK]
        return _row(self.storage.states.take_out(["?"], [tokens], {0: [block]}), 0)

    def draft(self, step: int, tokens: list[list[int]]) -> dict[str, int]:
        """Give each request drafts, and return how many tokens stay.

        ``tokens`` are what each request will draw. Every number of right drafts occurs in every
        row, beside rows of other widths.
        """
        counts = {}
        for number, row in enumerate(self.rows):
            right, wide = (step + 2 * number) % MOST, (3 * step + number) % MOST
            coming = tokens[number][len(row.output) : len(row.output) + MOST]
            row.drafts = [*coming[:right], *((x + 1) % 90 for x in coming[right:])][:wide]
            counts[row.req_id] = 1 + min(right, len(row.drafts))
        return counts


def _row(states: Any, row: int) -> Any:
    return [[np.array(part[row].astype(mx.float32)) for part in state] for state in states]
