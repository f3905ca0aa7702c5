"""Attention in parts is attention, in less memory."""

from __future__ import annotations

import mlx.core as mx
import pytest

from vllm_moe_compat.backend.pages import long_attention

HEADS, KV_HEADS, DIM = 4, 2, 32


def arrays(rows: int, count: int, context: int) -> tuple[mx.array, mx.array, mx.array]:
    mx.random.seed(1)
    found = [
        mx.random.normal((rows, heads, length, DIM))
        for heads, length in ((HEADS, count), (KV_HEADS, context), (KV_HEADS, context))
    ]
    mx.eval(found)
    return found[0], found[1], found[2]


@pytest.mark.parametrize("kind", ["causal", "none", "shared mask", "mask per row"])
@pytest.mark.parametrize("sinks", [False, True])
def test_parts_give_the_same_result(
    kind: str, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, count, context = 2, 37, 61
    queries, keys, values = arrays(rows, count, context)
    own = mx.random.normal((HEADS,)) if sinks else None
    position = mx.arange(context - count, context)[:, None]
    visible = mx.arange(context) <= position
    mask: mx.array | str | None = {
        "causal": "causal",
        "none": None,
        "shared mask": visible & (mx.arange(context) > position - 20),
        "mask per row": mx.stack([visible, mx.arange(context) < position - 3])[:, None],
    }[kind]
    whole = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=0.2, mask=mask, sinks=own
    )
    # Seven queries a part, the last one of two.
    monkeypatch.setattr(long_attention, "SCORE_LIMIT", 7 * rows * HEADS * context * 4)
    parts = long_attention.attend(queries, keys, values, 0.2, mask, own)
    assert parts.shape == whole.shape
    assert mx.abs(parts - whole).max().item() <= 1e-6


def test_the_memory_of_scores_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in bytes: as a whole, scores take 64 MiB."""
    count, small = 2048, 4 << 20
    queries, keys, values = arrays(1, count, count)
    peaks = {}
    for limit in (1 << 30, small):
        monkeypatch.setattr(long_attention, "SCORE_LIMIT", limit)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        out = long_attention.attend(queries, keys, values, 0.2, "causal")
        mx.eval(out)
        peaks[limit] = mx.get_peak_memory() - before - 2 * out.nbytes
        assert peaks[limit] <= long_attention.peak_bytes(HEADS, count, count)
        del out
    assert peaks[1 << 30] >= 4 * HEADS * count * count
    assert long_attention.peak_bytes(HEADS, count, count) == 5 * small
