"""Tokens drawn in MLX follow the probabilities that vLLM's own masks leave."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from support.frequencies import agrees
from vllm_moe_compat.backend.step import mlx_sampling
from vllm_moe_compat.backend.step.mlx_sampling import (
    MAX_SORTED_TOP_K,
    NO_TOKEN,
    SPARE_TIES,
    BatchSampler,
    SamplingRequest,
    rejection_draws,
)

VOCAB, ROWS, KEYS = 600, 2000, 8


def logits(vocab: int = VOCAB, kind: str = "peaked") -> Any:
    """Scores of one row; ``kind``: peaked, flat, or coarse, where many are equal."""
    draw = np.random.default_rng(5)
    if kind == "flat":
        return draw.normal(size=vocab).astype(np.float32)
    ranks = draw.permutation(vocab) + 1.0
    row = (8 - 1.3 * np.log(ranks) + 0.1 * draw.normal(size=vocab)).astype(np.float32)
    return np.round(row * 2) / 2 if kind == "coarse" else row


def exact(row: Any, params: SamplingRequest) -> Any:
    """Probabilities by vLLM's own temperature, masks and softmax."""
    scores = torch.from_numpy(row[None].copy()) / params.temperature
    k = torch.tensor([params.top_k or len(row)]) if params.top_k else None
    p = torch.tensor([params.top_p]) if params.top_p < 1 else None
    masked = apply_top_k_top_p_pytorch(scores, k, p)
    return masked.softmax(dim=-1, dtype=torch.float64)[0].numpy()


def drawn(row: Any, params: SamplingRequest, rows: int = ROWS, keys: int = KEYS) -> tuple[Any, int]:
    """Many draws, and how many of them were undecided at first."""
    draw = BatchSampler([params] * rows, len(row))
    scores = mx.broadcast_to(mx.array(row), (rows, len(row)))
    tokens: list[int] = []
    undecided = 0
    for number in range(keys):
        found = draw(scores, mx.random.key(number)).tolist()
        undecided += found.count(-1)
        tokens += draw.draw_undecided(scores, found, mx.random.key(1000 + number))
    return np.bincount(tokens, minlength=len(row)), undecided


@pytest.mark.parametrize("kind", ["peaked", "flat", "coarse"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingRequest(1.0),
        SamplingRequest(0.6),
        SamplingRequest(1.7),
        SamplingRequest(1.0, top_k=1),
        SamplingRequest(1.0, top_k=20),
        SamplingRequest(1.3, top_k=VOCAB - 1),
        SamplingRequest(0.6, top_k=20, top_p=0.95),
        SamplingRequest(1.0, top_k=300, top_p=0.5),
    ],
    ids=str,
)
def test_draws_follow_vllms_distribution(kind: str, params: SamplingRequest) -> None:
    row = logits(kind=kind)
    # So many tokens equal the 300th of the coarse ones that each row is undecided.
    counts, _ = drawn(row, params, rows=100 if (kind, params.top_k) == ("coarse", 300) else ROWS)
    if kind == "coarse" and params.top_p < 1:
        agrees(of_values(row, counts), of_values(row, exact(row, params)))
    else:
        agrees(counts, exact(row, params))


def of_values(row: Any, of_tokens: Any) -> Any:
    """By score: of equal ones at a nucleus' edge, which are kept is anybody's choice."""
    return np.bincount(np.unique(row, return_inverse=True)[1], weights=of_tokens)


@pytest.mark.parametrize("kind", ["peaked", "flat", "coarse"])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.8, 0.9, 0.95, 0.999])
def test_a_nucleus_is_vllms(kind: str, p: float) -> None:
    row = logits(kind=kind)
    counts, undecided = drawn(row, SamplingRequest(1.0, top_p=p), keys=4)
    expected = exact(row, SamplingRequest(1.0, top_p=p))
    # Rejection leaves as few as it promises.
    assert undecided < 2 * mlx_sampling.UNDECIDED_RATE * counts.sum()
    if kind == "coarse":
        agrees(of_values(row, counts), of_values(row, expected))
        # As many of the equal ones at the edge as there.
        assert np.count_nonzero(counts) <= np.count_nonzero(expected)
        edge = row == row[expected > 0].min()
        if expected[edge].max() * counts.sum() > 15:
            assert np.count_nonzero(counts[edge]) == np.count_nonzero(expected[edge])
    else:
        agrees(counts, expected)


def test_undecided_rows_are_drawn_without_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_sampling, "rejection_draws", lambda p: 1)
    row = logits(kind="flat")
    counts, undecided = drawn(row, SamplingRequest(1.0, top_p=0.6), rows=500)
    assert undecided > 500
    agrees(counts, exact(row, SamplingRequest(1.0, top_p=0.6)))


def test_more_equals_at_the_kth_place_than_there_is_room_for() -> None:
    row = np.full(VOCAB, -1.0, dtype=np.float32)
    row[: 2 * SPARE_TIES : 2] = 2.5
    row[7] = 4.0
    row[200:400] = 2.5
    counts, undecided = drawn(row, SamplingRequest(1.0, top_k=5), rows=50)
    assert undecided == counts.sum()
    expected = exact(row, SamplingRequest(1.0, top_k=5))
    assert np.count_nonzero(expected) == 1 + SPARE_TIES + 200
    assert not counts[expected == 0].any()
    # As many as there is room for: no row is left over.
    row[200:400] = -1.0
    counts, undecided = drawn(row, SamplingRequest(1.0, top_k=5))
    assert not undecided
    agrees(counts, exact(row, SamplingRequest(1.0, top_k=5)))


def test_a_top_k_that_is_too_large_to_sort() -> None:
    row = logits(3000, "flat")
    params = SamplingRequest(1.0, top_k=MAX_SORTED_TOP_K + 1, top_p=0.7)
    counts, undecided = drawn(row, params, rows=200, keys=2)
    assert undecided == counts.sum()
    expected = exact(row, params)
    assert not counts[expected == 0].any()
    likely = expected > np.median(expected[expected > 0])
    share = expected[likely].sum()
    slack = 4 * (share * (1 - share) / counts.sum()) ** 0.5
    assert abs(counts[likely].sum() / counts.sum() - share) < slack


def test_a_vocabulary_of_real_size_in_half_precision() -> None:
    vocab = 32_003
    row = mx.array(logits(vocab)).astype(mx.bfloat16)
    batch = [
        SamplingRequest(),
        SamplingRequest(1.0),
        SamplingRequest(0.7, 20, 0.8),
        SamplingRequest(1.0, 0, 0.9),
    ] * 8
    tokens = BatchSampler(batch, vocab)(mx.broadcast_to(row, (len(batch), vocab)), mx.random.key(1))
    wide = np.array(row.astype(mx.float32))
    for params, token in zip(batch, tokens.tolist(), strict=True):
        if params.temperature == 0:
            assert token == wide.argmax()
        elif token >= 0:
            # Which of equal ones at the edge: anybody's choice.
            assert wide[token] >= wide[exact(wide, params) > 0].min()


def test_rows_of_a_mixed_batch_are_drawn_by_their_own_parameters() -> None:
    draw = np.random.default_rng(0)
    kinds = [
        SamplingRequest(),
        SamplingRequest(1.0, 1),
        SamplingRequest(1.0, 3),
        SamplingRequest(1.0, 0, 0.3),
        SamplingRequest(1.0),
        SamplingRequest(2.0, 5, 0.5),
    ]
    batch = [kinds[i] for i in draw.integers(0, len(kinds), 200)]
    rows = 3 * draw.normal(size=(len(batch), VOCAB)).astype(np.float32)
    both = BatchSampler(batch, VOCAB)
    tokens = both.draw_undecided(
        mx.array(rows), both(mx.array(rows), mx.random.key(3)).tolist(), mx.random.key(4)
    )
    for row, params, token in zip(rows, batch, tokens, strict=True):
        if params.temperature == 0:
            assert token == row.argmax()
        else:
            assert exact(row, params)[token] > 0
    free = [
        token for params, token in zip(batch, tokens, strict=True) if params == SamplingRequest(1.0)
    ]
    assert len(set(free)) > len(free) / 4


def test_the_first_of_equals_is_the_greedy_one_as_in_torch() -> None:
    rows = np.zeros((6, VOCAB), dtype=np.float32)
    rows[1, [5, 77, 599]] = 3
    rows[2] = -np.inf
    rows[3, [9, 40]] = np.nan
    rows[4, [8, 30]] = np.inf
    rows[5, 598:] = 1
    tokens = BatchSampler([SamplingRequest()] * 6, VOCAB)(mx.array(rows), mx.random.key(0)).tolist()
    expected = torch.from_numpy(rows).argmax(dim=-1).tolist()
    expected[2:5] = [NO_TOKEN] * 3
    assert tokens == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingRequest(1.0),
        SamplingRequest(1.0, 5),
        SamplingRequest(1.0, 5, 0.5),
        SamplingRequest(1.0, 0, 0.9),
        SamplingRequest(1.0, VOCAB - 1),
    ],
)
def test_rows_without_a_distribution_give_no_token(params: SamplingRequest) -> None:
    rows = np.stack([logits()] * 4)
    rows[0] = -np.inf
    rows[1, [9, 40]] = np.nan
    rows[2, [8, 30]] = np.inf
    draw = BatchSampler([params] * 4, VOCAB)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        tokens = draw(mx.array(rows).astype(dtype), mx.random.key(0)).tolist()
        assert tokens[:3] == [NO_TOKEN] * 3
        tokens = draw.draw_undecided(mx.array(rows), tokens, mx.random.key(1))
        assert tokens[:3] == [NO_TOKEN] * 3
        assert tokens[3] >= 0


def test_tokens_that_are_ruled_out_are_never_drawn() -> None:
    rows = np.full((ROWS, VOCAB), -np.inf, dtype=np.float32)
    rows[:, [0, 255, 256, 599]] = [1.0, 0.5, 0.0, -60.0]
    for params in (SamplingRequest(1.0), SamplingRequest(1.0, 50), SamplingRequest(1.0, 0, 0.999)):
        draw = BatchSampler([params] * ROWS, VOCAB)
        tokens = draw.draw_undecided(
            mx.array(rows), draw(mx.array(rows), mx.random.key(9)).tolist(), mx.random.key(10)
        )
        assert set(tokens) == {0, 255, 256}


def test_a_nucleus_of_less_than_one_token_is_the_likeliest() -> None:
    for p in (1e-320, 1e-9, 1 / VOCAB):
        counts, _ = drawn(logits(kind="flat"), SamplingRequest(1.0, top_p=p), rows=3, keys=1)
        assert counts.argmax() == logits(kind="flat").argmax()
        assert counts.max() == counts.sum()


def test_tries_are_as_many_as_the_promise_takes() -> None:
    assert rejection_draws(0.999) == 1
    assert rejection_draws(0.95) == rejection_draws(0.9) == 2
    assert rejection_draws(0.5) == 4
    assert rejection_draws(1e-6) < 30
