"""Forward passes on pages give what mlx-lm gives for one sequence."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from support import hybrid
from vllm_moe_compat.backend.step import batch as batch_module
from vllm_moe_compat.backend.step.batch import make_pass
from vllm_moe_compat.backend.step.forward import Forward


def single(served: Any, prompt: list[int], count: int) -> list[int]:
    cache, out = served.make_cache(), []
    tokens = mx.array([prompt])
    for _ in range(count):
        token = int(mx.argmax(served(tokens, cache=cache)[0, -1]).item())
        out.append(token)
        tokens = mx.array([[token]])
    return out


@pytest.mark.parametrize("greedy", [True, False], ids=["next pass built early", "one by one"])
def test_tokens_are_those_of_single_sequences(greedy: bool) -> None:
    served = hybrid.model()
    rows = hybrid.requests([40, 17, 31, 5])
    forward = Forward(served, hybrid.storage(served, 1 << 20))
    hybrid.prefill(forward, rows)
    for _ in range(24):
        hybrid.decode(forward, rows, greedy=greedy)
    for row in rows:
        assert row.output == single(served, row.prompt, 24)
    assert (forward.hits > 10) == greedy


@pytest.mark.parametrize("chunk", [None, 29], ids=["whole prompts", "chunks"])
def test_long_prompts_in_several_passes_read_nothing_stale(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every page holds NaN at first, and the passes end inside blocks of 16."""
    monkeypatch.setattr(batch_module, "PASS_TOKENS_ON_CPU", 12)
    served = hybrid.model()
    storage = hybrid.storage(served, 1 << 20)
    for pool in storage.distinct_pools:
        pool.pages[1:] = mx.array(0x7FC00000, dtype=mx.uint32)
    forward, batch = Forward(served, storage), batch_module.Batch()
    rows = hybrid.requests([61, 44, 31, 5])
    batch.requests = {row.req_id: row for row in rows}
    begin = 0
    while rows[0].computed < len(rows[0].prompt):
        scheduled = {
            row.req_id: min(len(row.prompt) - begin, chunk or len(row.prompt))
            for row in rows
            if begin < len(row.prompt)
        }
        storage.zero_blocks(batch.partial_blocks(scheduled, storage.attention_block_sizes))
        for work in batch.prefills(scheduled, storage.block_sizes):
            forward(work, [])
        begin += chunk or len(rows[0].prompt)
        for row in rows:
            row.computed = min(begin, len(row.prompt))
    for _ in range(6):
        for row in rows:
            row.computed = row.num_tokens - 1
        one_each = {row.req_id: 1 for row in rows}
        storage.zero_blocks(batch.partial_blocks(one_each, storage.attention_block_sizes))
        hybrid.decode(forward, rows)
    for row in rows:
        assert row.output == single(served, row.prompt, 6)


def test_a_pass_built_early_is_discarded_when_another_comes() -> None:
    served = hybrid.model()
    rows = hybrid.requests([40, 17, 31, 5])
    forward = Forward(served, hybrid.storage(served, 1 << 20))
    hybrid.prefill(forward, rows)
    hybrid.decode(forward, rows, greedy=True)
    # Fewer rows; then another token than the likeliest.
    hybrid.decode(forward, rows[:3], greedy=True)
    assert forward.hits == 0
    rows[0].output[-1] = (rows[0].output[-1] + 1) % hybrid.TEXT["vocab_size"]
    taken = rows[0].prompt + rows[0].output
    hybrid.decode(forward, rows[:3], greedy=True)
    assert forward.hits == 0
    hybrid.decode(forward, rows[:3], greedy=True)
    assert forward.hits == 1
    assert rows[0].output[-2:] == single(served, taken, 2)
    for row in rows[1:3]:
        assert row.output == single(served, row.prompt, len(row.output))


def test_logits_of_a_chosen_row_are_its_own() -> None:
    served = hybrid.model()
    rows = hybrid.requests([9, 6])
    forward = Forward(served, hybrid.storage(served, 1 << 20))
    work = make_pass([(row, 0, len(row.prompt)) for row in rows])
    logits = forward(work, [1])
    own = served(mx.array([rows[1].prompt]), cache=served.make_cache())
    assert mx.allclose(logits[0, :6], own[0], atol=1e-4).item()
