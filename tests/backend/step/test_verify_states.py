"""After drafts were verified, states are those of passes of one token, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from support import hybrid, state_families
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.model.dry_run import dry_run
from vllm_moe_compat.backend.model.state_recording import StateRecording
from vllm_moe_compat.backend.pages.layers import StateLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.state_pool import StatePool
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Batch, Request
from vllm_moe_compat.backend.step.forward import Forward

BLOCK = 4
STEPS = 16
MOST = 5
# One family per way of computing states, with padded rows or without.
DAILY = ("qwen3_5", "granitemoehybrid", "jamba", "bailing_moe_linear")
NAMES = [
    *DAILY,
    *(pytest.param(x, marks=pytest.mark.full) for x in state_families.NAMES if x not in DAILY),
]


class Served:
    """A model on pages of its own, with requests whose prompts are computed."""

    def __init__(self, model: Any) -> None:
        layers = dry_run(model, describe(model)).layers
        pools, groups = {}, {}
        for layer in layers:
            stateful = isinstance(layer, StateLayer)
            size = (
                StatePool.bytes_per_sequence([layer])
                if isinstance(layer, StateLayer)
                else layer.token_bytes * BLOCK
            )
            pools[layer.index] = PagePool(128, size, mx.float32)
            groups[layer.index] = 0 if stateful else 1
        self.storage = LayerStorage(layers, pools, groups, [BLOCK] * 2, keep_boundaries=True)
        self.forward = Forward(model, self.storage)
        self.batch = Batch()
        draw, free = np.random.default_rng(0), list(range(1, 128))
        for number, length in enumerate((6, 11, 3)):
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
        return list(self.batch.requests.values())

    def begin(self) -> dict[str, int]:
        for row in self.rows:
            row.computed = row.num_tokens - 1
        scheduled = {row.req_id: 1 for row in self.rows}
        blocks = self.batch.partial_blocks(scheduled, self.storage.attention_block_sizes)
        self.storage.zero_blocks(blocks)
        return scheduled

    def states(self) -> dict[str, Any]:
        """The resident state of every request."""
        return {
            req_id: [[np.array(part[row]) for part in state] for state in bank.states]
            for bank in self.storage.states.banks
            for row, req_id in enumerate(bank.req_ids)
        }

    def page(self, request: Request, tokens: int) -> Any:
        """The state after so many tokens that was written to a page."""
        states = self.storage.states
        block = request.blocks[0][(tokens - 1) // BLOCK]
        return [
            [np.array(x[0]) for x in states._read(i, [block])] for i in range(len(states.layers))
        ]


def unspeculated(model: Any) -> tuple[list[list[int]], dict[tuple[str, int], Any]]:
    """Return the tokens of each request, and its state after each number of tokens."""
    served = Served(model)
    found = {}
    for _ in range(STEPS + MOST):
        served.begin()
        hybrid.decode(served.forward, served.rows)
        for req_id, state in served.states().items():
            found[req_id, served.batch.requests[req_id].num_tokens - 1] = state
    served.forward.close()
    return [row.output for row in served.rows], found


def same(found: Any, expected: Any) -> bool:
    return all(
        np.array_equal(one, other)
        for mine, theirs in zip(found, expected, strict=True)
        for one, other in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_states_after_rejected_drafts_are_those_without_drafts(name: str) -> None:
    """Every number of right drafts occurs in every row, beside rows of other widths."""
    model = state_families.build(name)
    tokens, states = unspeculated(model)
    served = Served(model)
    served.forward.recording = StateRecording(model)
    written = 0
    for step in range(STEPS):
        scheduled = served.begin()
        counts = {}
        for number, row in enumerate(served.rows):
            right, wide = (step + 2 * number) % MOST, (3 * step + number) % MOST
            coming = tokens[number][len(row.output) : len(row.output) + MOST]
            row.drafts = [*coming[:right], *((x + 1) % 90 for x in coming[right:])][:wide]
            counts[row.req_id] = 1 + min(right, len(row.drafts))
        before = {row.req_id: row.num_tokens for row in served.rows}
        work = served.batch.decodes([row.req_id for row in served.rows], scheduled)
        if work.verifies:
            served.forward.verify(work)
            served.forward.accept(counts)
        else:
            hybrid.decode(served.forward, served.rows)
        for number, row in enumerate(served.rows):
            del row.output[before[row.req_id] - len(row.prompt) :]
            row.output += tokens[number][len(row.output) :][: counts[row.req_id]]
        for req_id, state in served.states().items():
            row = served.batch.requests[req_id]
            assert same(state, states[req_id, row.num_tokens - 1])
            for end in range(before[req_id], row.num_tokens):
                if end % BLOCK == 0 and work.verifies:
                    assert same(served.page(row, end), states[req_id, end])
                    written += 1
        if any(len(row.output) >= STEPS for row in served.rows):
            break
    assert written > 2
    served.forward.close()
