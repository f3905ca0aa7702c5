"""After drafts were verified, states are those of passes of one token, bit for bit."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from support import hybrid, state_families
from support.drafted import BLOCK, MOST, STEPS, Served
from vllm_moe_compat.backend.model.state_recording import StateRecording

LATENTS_FIRST = "kimi_linear, latents first"
# One family per way of computing states, with padded rows or without.
DAILY = ("qwen3_5", "granitemoehybrid", "jamba", "bailing_moe_linear", LATENTS_FIRST)
CASES = [
    *((name, mx.float32) for name in DAILY),
    *(
        pytest.param(name, dtype, marks=pytest.mark.full)
        for name in (*state_families.NAMES, LATENTS_FIRST)
        for dtype in (mx.float32, mx.bfloat16)
        if name not in DAILY or dtype != mx.float32
    ),
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


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_states_after_rejected_drafts_are_those_without_drafts(name: str, dtype: mx.Dtype) -> None:
    model = state_families.build(name, dtype)
    tokens, states = unspeculated(model)
    served = Served(model)
    served.forward.recording = StateRecording(model)
    written = 0
    for step in range(STEPS):
        scheduled = served.begin()
        counts = served.draft(step, tokens)
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
