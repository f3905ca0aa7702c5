"""Every way to read pages agrees with attention over the tokens themselves."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from vllm_moe_compat.backend.pages import decode_attention
from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.paged_kv import PagedKV

HEADS, GROUP, DIM, BLOCK = 2, 3, 16, 8
DTYPES = (mx.float32, mx.bfloat16)
# Contexts behind the new token: at block edges, alone, even, ragged.
CONTEXTS = [[0], [7], [8], [9, 9], [0, 7, 8, 40], [64, 1], [23, 23, 23]]


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        # MLX's CPU gather_mm, and so this path, is float32 only.
        ("on_pool", mx.float32),
        *((path, dtype) for path in ("per_request", "gather") for dtype in DTYPES),
    ],
    ids=str,
)
@pytest.mark.parametrize("contexts", CONTEXTS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 8, 20], ids=lambda window: f"window {window}")
def test_paths_agree_with_attention_over_each_row(
    path: str, contexts: list[int], dtype: mx.Dtype, window: int | None
) -> None:
    mx.random.seed(1)
    draw = np.random.default_rng(1)
    layer = AttentionLayer(0, HEADS, DIM, dtype, window=window)
    sinks = mx.random.normal((HEADS * GROUP,)).astype(dtype) if window else None
    need = [n // BLOCK + 1 for n in contexts]
    blocks = draw.permutation(np.arange(1, 1 + sum(need)))
    tables = np.zeros((len(contexts), max(need)), dtype=np.int64)
    for i, count in enumerate(need):
        tables[i, :count], blocks = blocks[:count], blocks[count:]
    pool = PagePool(1 + sum(need), 2 * HEADS * BLOCK * DIM * dtype.size, dtype)
    want = []
    queries = mx.random.normal((len(contexts), HEADS * GROUP, 1, DIM)).astype(dtype)
    fresh = []
    for i, n in enumerate(contexts):
        keys, values = (mx.random.normal((1, HEADS, n + 1, DIM)).astype(dtype) for _ in "kv")
        if n:
            behind = AttentionMetadata(np.array([0]), np.array([n]), tables[i : i + 1], BLOCK)
            PagedKV(layer, pool, behind).update_and_fetch(keys[:, :, :n], values[:, :, :n])
        first = max(0, n + 1 - window) if window else 0
        seen = (keys[:, :, first:], values[:, :, first:])
        query = queries[i : i + 1]
        want.append(mx.fast.scaled_dot_product_attention(query, *seen, scale=0.3, sinks=sinks))
        fresh.append((keys[:, :, n:], values[:, :, n:]))
    step = AttentionMetadata(np.array(contexts), np.ones(len(contexts), np.int64), tables, BLOCK)
    if window:
        step = step.with_window(window)
        assert step.tables.shape[1] <= -(-window // BLOCK) + 1
    cache = PagedKV(layer, pool, step, attends_itself=True)
    cache.update_and_fetch(*(mx.concatenate(list(x)) for x in zip(*fresh, strict=True)))
    found = decode_attention.PATHS[path](queries, pool, step, layer, 0.3, sinks)
    tolerance = 1e-5 if dtype == mx.float32 else 3e-2
    assert mx.allclose(found, mx.concatenate(want), atol=tolerance).item()
    assert cache.make_mask(1) is None


@pytest.mark.parametrize("window", [None, 3, 8, 19])
@pytest.mark.parametrize(
    "rows", [[(0, 21)], [(5, 9)], [(24, 1)], [(0, 21), (0, 4)], [(16, 7), (3, 2), (40, 1)]], ids=str
)
@pytest.mark.parametrize("value_dim", [None, 4])
def test_passes_of_several_tokens_see_what_one_sequence_sees(
    rows: list[tuple[int, int]], window: int | None, value_dim: int | None
) -> None:
    """Chunks and prompts: keys, values and mask that the model is given, against mlx-lm's."""
    from mlx_lm.models.base import create_causal_mask

    mx.random.seed(1)
    layer = AttentionLayer(0, HEADS, DIM, mx.float32, value_dim=value_dim, window=window)
    need = [-(-(start + count) // BLOCK) for start, count in rows]
    tables = np.zeros((len(rows), max(need)), dtype=np.int64)
    for i, count in enumerate(need):
        tables[i, :count] = np.arange(count) + 1 + sum(need[:i])
    pool = PagePool(1 + sum(need), layer.token_bytes * BLOCK, mx.float32)
    starts, counts = (np.array(x) for x in zip(*rows, strict=True))
    width = int(counts.max())
    queries = mx.random.normal((len(rows), HEADS * GROUP, width, DIM))
    want, new = [], []
    for i, (start, count) in enumerate(rows):
        keys = mx.random.normal((1, HEADS, start + width, DIM))
        values = mx.random.normal((1, HEADS, start + width, value_dim or DIM))
        if start:
            behind = AttentionMetadata(np.array([0]), np.array([start]), tables[i : i + 1], BLOCK)
            PagedKV(layer, pool, behind).update_and_fetch(keys[:, :, :start], values[:, :, :start])
        new.append((keys[:, :, start:], values[:, :, start:]))
        end = start + count
        mask = create_causal_mask(count, start, window_size=window)
        query, seen = queries[i : i + 1, :, :count], (keys[:, :, :end], values[:, :, :end])
        want.append(mx.fast.scaled_dot_product_attention(query, *seen, scale=0.3, mask=mask))
    step = AttentionMetadata(starts, counts, tables, BLOCK)
    step = step.with_window(window) if window else step
    cache = PagedKV(layer, pool, step)
    assert cache.offset.tolist() == starts.tolist()
    keys, values = cache.update_and_fetch(
        *(mx.concatenate(list(x)) for x in zip(*new, strict=True))
    )
    for as_array in (False, True):
        mask = cache.make_mask(width, return_array=as_array, window_size=window)
        assert not (as_array and isinstance(mask, str))
        found = cache.attend(queries, keys, values, 0.3, mask)
        for i, (_, count) in enumerate(rows):
            assert mx.allclose(found[i : i + 1, :, :count], want[i], atol=1e-5).item()


def step_of(contexts: list[int]) -> AttentionMetadata:
    width = max(contexts) // BLOCK + 1
    tables = np.ones((len(contexts), width), dtype=np.int64)
    return AttentionMetadata(np.array(contexts), np.ones(len(contexts), np.int64), tables, BLOCK)


def test_the_rule_looks_at_dtype_and_padding() -> None:
    assert decode_attention.choose_path(step_of([4000, 4000]), mx.bfloat16) == "gather"
    assert decode_attention.choose_path(step_of([4000, 100, 100]), mx.bfloat16) == "per_request"
    assert decode_attention.choose_path(step_of([20, 1, 1]), mx.bfloat16) == "gather"
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    assert (decode_attention.choose_path(step_of([40]), mx.float32) == "on_pool") == on_cpu
