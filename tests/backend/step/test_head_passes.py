"""Passes of prediction heads: paged and in parts they draft what one pass over all tokens does."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from support import heads as small
from support import hybrid
from vllm_moe_compat.backend.pages import decode_attention
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.head_passes import HeadPasses, HeadRow

POOL_BYTES = 64 << 20
DRAFTS = 4


@pytest.fixture(scope="module")
def heads() -> Any:
    return small.RandomHeads(hybrid.model())


@pytest.fixture
def storage(heads: Any) -> LayerStorage:
    return small.storage(heads, POOL_BYTES)


@pytest.fixture
def passes(heads: Any, storage: LayerStorage) -> Any:
    made = HeadPasses(heads, storage, small.VOCABULARY)
    yield made
    made.close()


def row(request: Request, start: int, end: int) -> HeadRow:
    return HeadRow(request, start, small.hidden_states(request, end)[start:])


def fill_with_nan(storage: LayerStorage) -> None:
    pool = storage.distinct_pools[0]
    nan = mx.array(np.full(1, np.nan, dtype=np.float32)).view(pool.raw)
    pool.pages = mx.broadcast_to(nan, pool.pages.shape) + mx.array(0, dtype=pool.raw)
    mx.eval(pool.pages)
    pool.zero([0])


@pytest.mark.parametrize("chunks", [[1.0], [0.3, 0.7], [0.1, 0.2, 0.9]], ids=str)
def test_prompts_in_chunks_give_the_drafts_of_one_pass(
    heads: Any, passes: HeadPasses, storage: LayerStorage, chunks: list[float]
) -> None:
    """On pages full of NaN: only positions of the request itself may be read."""
    fill_with_nan(storage)
    requests = hybrid.requests([40, 17, 33, 5])
    starts = dict.fromkeys((request.req_id for request in requests), 0)
    for share in [*chunks[:-1]]:
        rows = []
        for request in requests:
            end = max(1, int(share * (request.num_tokens - 2)))
            if end > starts[request.req_id]:
                rows.append(row(request, starts[request.req_id], end))
                starts[request.req_id] = end
        passes.write(rows)
    last = [row(r, starts[r.req_id], r.num_tokens - 1) for r in requests]
    found = passes.draft(last, [DRAFTS] * len(requests))
    assert found == [small.reference(heads, request, DRAFTS) for request in requests]


def test_rows_get_as_many_drafts_as_they_ask_for(heads: Any, passes: HeadPasses) -> None:
    requests = hybrid.requests([9, 20, 3])
    counts = [1, 4, 2]
    found = passes.draft([row(r, 0, r.num_tokens - 1) for r in requests], counts)
    assert found == [
        small.reference(heads, request, count)
        for request, count in zip(requests, counts, strict=True)
    ]


def test_drafts_that_were_discarded_leave_no_trace(heads: Any, passes: HeadPasses) -> None:
    """Across block boundaries: each chain writes to slots that the next row overwrites."""
    requests = hybrid.requests([13, 30])
    passes.draft([row(r, 0, r.num_tokens - 1) for r in requests], [DRAFTS] * 2)
    draw = np.random.default_rng(0)
    for _ in range(12):
        starts = [request.num_tokens - 1 for request in requests]
        for request in requests:
            count = int(draw.integers(1, DRAFTS + 2))
            request.output += [int(t) for t in draw.integers(0, small.VOCABULARY, count)]
        rows = [row(r, s, r.num_tokens - 1) for r, s in zip(requests, starts, strict=True)]
        found = passes.draft(rows, [DRAFTS] * 2)
        assert found == [small.reference(heads, request, DRAFTS) for request in requests]


def test_a_head_for_one_sequence_at_a_time(heads: Any, storage: LayerStorage) -> None:
    from dataclasses import replace

    storage.layers = [replace(storage.layers[0], single_sequence=True)]
    passes = HeadPasses(heads, storage, small.VOCABULARY)
    requests = hybrid.requests([9, 20, 3])
    passes.write([row(request, 0, 1) for request in requests])
    found = passes.draft([row(r, 1, r.num_tokens - 1) for r in requests], [2, 1, 3])
    assert found == [
        small.reference(heads, request, count)
        for request, count in zip(requests, [2, 1, 3], strict=True)
    ]
    passes.close()


@pytest.mark.parametrize("path", ["on_pool", "per_request", "gather"])
def test_no_pool_is_copied(passes: HeadPasses, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "choose_path", lambda metadata, dtype: path)
    requests = hybrid.requests([40, 17, 33, 5])

    def steps() -> None:
        passes.write([row(r, 0, r.num_tokens - 3) for r in requests])
        for _ in range(3):
            passes.draft([row(r, r.num_tokens - 3, r.num_tokens - 1) for r in requests], [5] * 4)

    assert _growth(steps) < POOL_BYTES // 16


def test_the_count_sees_a_copy(passes: HeadPasses, storage: LayerStorage) -> None:
    requests = hybrid.requests([40, 17])
    rows = [row(r, 0, r.num_tokens - 1) for r in requests]
    held = storage.distinct_pools[0].pages
    assert _growth(lambda: passes.draft(rows, [2, 2])) >= POOL_BYTES
    assert held is not storage.distinct_pools[0].pages


def test_drafts_are_tokens_with_embeddings_even_after_nan(
    heads: Any, storage: LayerStorage
) -> None:
    passes = HeadPasses(heads, storage, token_rows=10)
    requests = hybrid.requests([9, 20])
    rows = [row(r, 0, r.num_tokens - 1) for r in requests]
    spoilt = HeadRow(rows[0].request, 0, mx.full(rows[0].hidden.shape, float("nan")))
    alone = passes.draft(rows[1:], [DRAFTS])
    found = passes.draft([spoilt, rows[1]], [DRAFTS, DRAFTS])
    assert all(0 <= token < 10 for tokens in found for token in tokens)
    # Nothing of it reaches another row, or stays.
    assert found[1:] == alone
    assert mx.isfinite(storage.distinct_pools[0].pages.view(mx.float32)).all()
    passes.close()


def test_a_token_without_an_embedding_reads_no_memory_beyond(
    heads: Any, passes: HeadPasses
) -> None:
    """Its request ends in the next step; garbage, and NaN, could not be told from others."""
    request, same = hybrid.requests([9, 9])
    request.prompt[-1], same.prompt[:] = small.VOCABULARY + 3, request.prompt
    same.prompt[-1] = small.VOCABULARY - 1
    first, second = (row(r, 0, r.num_tokens - 1) for r in (request, same))
    second = HeadRow(same, 0, first.hidden)
    found = passes.draft([first, second], [DRAFTS, DRAFTS])
    assert found[0] == found[1]


def test_a_pass_that_cannot_be_built_leaves_the_pool(
    heads: Any, passes: HeadPasses, storage: LayerStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = hybrid.requests([9, 20])
    passes.write([row(r, 0, r.num_tokens - 2) for r in requests])
    before = storage.distinct_pools[0].pages
    rest = [row(r, r.num_tokens - 2, r.num_tokens - 1) for r in requests]
    compute = small.RandomHeads.decode

    def fail(*args: Any) -> Any:
        compute(*args)
        raise TypeError("after keys and values were written")

    with monkeypatch.context() as broken:
        broken.setattr(small.RandomHeads, "decode", fail)
        with pytest.raises(TypeError, match="were written"):
            passes.draft(rest, [2, 2])
    assert storage.distinct_pools[0].pages is before
    found = passes.draft(rest, [2, 2])
    assert found == [small.reference(heads, request, 2) for request in requests]


def _growth(step: Any) -> int:
    """Bytes by which the peak exceeds what is held before ``step``."""
    mx.clear_cache()
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step()
    return int(mx.get_peak_memory()) - int(before)
