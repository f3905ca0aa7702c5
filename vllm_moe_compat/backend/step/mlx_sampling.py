"""Sampling in MLX: temperature, top-k and top-p, and nothing else.

Logits ``[B, V]`` stay where they are and only tokens ``[B]`` leave MLX. The distribution is that
of vLLM's sampler: divide by the temperature, keep the tokens no smaller than the k-th largest, of
those keep the fewest whose probabilities sum to p, draw. Sorting the vocabulary would take most
of the time (14 ms for 152k tokens on MLX's CPU build, 20 ms in torch), so each row takes one of
four methods that avoid it:

* **greedy**: the first of the largest logits, as in torch; also for a top-p below 1/V.
* **top_k**, for k up to ``MAX_SORTED_TOP_K``: the vocabulary is cut into runs of 16 tokens. The
  k largest tokens lie in the k runs with the largest maxima, so only those runs are sorted.
* **all**: from the whole vocabulary by cumulative sums, first the run of tokens, then the token
  in it. Two short sums round less than a long one, and take two random numbers per row instead
  of one per token.
* **top_p**: rejection without sorting. A token belongs to the nucleus if all likelier tokens
  together have less than p. One token is drawn from the whole distribution. If it is rejected,
  nothing less likely belongs to the nucleus either, and the next token is drawn from the likelier
  ones. Accepted tokens follow the distribution of the nucleus.

A row may stay undecided (token ``UNDECIDED``): if its draws were all rejected (less than one case
in a hundred), if more tokens equal the k-th largest than the sorted runs hold, or if k is too
large to sort. ``draw_undecided`` draws those one by one. A row without a distribution (a NaN,
+inf, or -inf everywhere) gives ``NO_TOKEN``: its maximum, computed in the same evaluation, is not
finite.

Of equally likely tokens at the edge of a nucleus, vLLM keeps as many as are needed, those that
its sort places last; here the first ones are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

# The largest top-k that is sorted, and additional room for tokens that equal the k-th.
MAX_SORTED_TOP_K, SPARE_TIES = 1024, 64
# Tokens per run: for top-k, and for sums over the whole vocabulary.
SHORT_RUN, LONG_RUN = 16, 256
# Rejection: the share of rows that may be left undecided.
UNDECIDED_RATE = 0.01
# Results that are no tokens: to be drawn again, and a row from which nothing can be drawn.
UNDECIDED, NO_TOKEN = -1, -2
# The largest float32 below one.
BELOW_ONE = 1 - 2**-24


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Parameters of a row: ``temperature`` 0 is greedy, ``top_k`` 0 and ``top_p`` 1 keep all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(slots=True)
class _Group:
    """Rows that take the same method, and their parameters as columns ``[b, 1]``."""

    rows: list[int]
    index: mx.array
    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    largest_top_k: int
    draws: int


@dataclass
class BatchSampler:
    """Samples one batch; its groups of rows are built once for as long as the batch is the same.

    Attributes:
        requests: parameters of each row.
        vocab: V.
    """

    requests: Sequence[SamplingRequest]
    vocab: int
    _groups: dict[str, _Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        methods = [self._method(request) for request in self.requests]
        for method in ("greedy", "top_k", "top_p", "all", "one_by_one"):
            rows = [row for row, found in enumerate(methods) if found == method]
            if rows:
                self._groups[method] = _group(rows, [self.requests[row] for row in rows])
        order = [row for group in self._groups.values() for row in group.rows]
        self._to_batch_order = mx.array(np.argsort(order).astype(np.uint32))

    def _method(self, request: SamplingRequest) -> str:
        # A nucleus of at most 1/V holds only the likeliest token.
        if request.temperature == 0 or request.top_p * self.vocab <= 1:
            return "greedy"
        if 0 < request.top_k < self.vocab:
            return "top_k" if request.top_k <= MAX_SORTED_TOP_K else "one_by_one"
        return "top_p" if request.top_p < 1 else "all"

    def __call__(self, logits: mx.array, key: mx.array) -> mx.array:
        """Return tokens ``[B]`` int32 for ``logits [B, V]``, not evaluated.

        A row gives ``UNDECIDED`` for ``draw_undecided``, or ``NO_TOKEN``.
        """
        found = []
        keys = mx.random.split(key, len(self._groups)) if len(self._groups) > 1 else [key]
        for (method, group), own_key in zip(self._groups.items(), keys, strict=True):
            part = logits if len(self._groups) == 1 else logits[group.index]
            if method == "greedy":
                tokens = mx.argmax(part, axis=-1).astype(mx.int32)
            elif method == "one_by_one":
                tokens = mx.full((len(group.rows),), UNDECIDED, dtype=mx.int32)
            else:
                scores = part.astype(mx.float32) / group.temperature
                if method == "top_k":
                    largest = group.largest_top_k
                    tokens = draw_top_k(scores, group.top_k, group.top_p, largest, own_key)
                elif method == "top_p":
                    tokens = draw_top_p(scores, group.top_p, group.draws, own_key)
                else:
                    tokens = draw_from_all(scores, own_key)
            found.append(tokens)
        drawn = found[0] if len(found) == 1 else mx.concatenate(found)[self._to_batch_order]
        return mx.where(mx.isfinite(logits.max(axis=-1)), drawn, NO_TOKEN)

    def draw_undecided(self, logits: mx.array, tokens: list[int], key: mx.array) -> list[int]:
        """Return ``tokens`` with the undecided ones drawn from the same ``logits [B, V]``."""
        complete = list(tokens)
        for row, token in enumerate(tokens):
            if token == UNDECIDED:
                key, own_key = mx.random.split(key)
                complete[row] = self.draw_row(logits, row, own_key)
        return complete

    def draw_row(self, logits: mx.array, row: int, key: mx.array) -> int:
        """Return a token drawn from one row of ``logits [B, V]``, which has a distribution."""
        request = self.requests[row]
        scores = logits[row : row + 1].astype(mx.float32) / request.temperature
        if 0 < request.top_k < self.vocab:
            scores = mx.where(scores >= _kth_largest(scores, request.top_k), scores, -mx.inf)
        token = UNDECIDED
        while token < 0:
            key, own_key = mx.random.split(key)
            p = mx.array([[request.top_p]])
            drawn = draw_top_p(scores, p, rejection_draws(request.top_p), own_key)
            token = int(np.array(drawn)[0])
        return token


def _group(rows: list[int], requests: Sequence[SamplingRequest]) -> _Group:
    def column(values: list[Any], dtype: mx.Dtype) -> mx.array:
        return mx.array(values, dtype=dtype)[:, None]

    top_k = [request.top_k for request in requests]
    return _Group(
        rows,
        mx.array(rows, dtype=mx.uint32),
        column([request.temperature for request in requests], mx.float32),
        column(top_k, mx.int32),
        column([request.top_p for request in requests], mx.float32),
        max(top_k),
        max(rejection_draws(request.top_p) for request in requests),
    )


def rejection_draws(p: float) -> int:
    """Return how many draws leave a row undecided in less than ``UNDECIDED_RATE`` of all cases.

    Each rejection leaves a uniformly distributed share of the mass, so the number of rejections
    before the share falls below p is Poisson distributed with mean ln(1/p).
    """
    mean = -math.log(p)
    count, term = 0, math.exp(-mean)
    left = 1 - term
    while left >= UNDECIDED_RATE:
        count += 1
        term *= mean / count
        left -= term
    return count + 1


def draw_from_all(scores: mx.array, key: mx.array) -> mx.array:
    """Draw from the softmax of ``scores [B, V]``."""
    weights = _runs(mx.softmax(scores, axis=-1), LONG_RUN, 0)
    sums = weights.sum(axis=-1)
    token, weight = _draw_from_runs(weights, sums, key)
    return _or_token_zero(mx.where(weight > 0, token, -1), sums.sum(axis=-1))


def draw_top_p(scores: mx.array, p: mx.array, draws: int, key: mx.array) -> mx.array:
    """Draw from the nucleus of mass ``p [B, 1]``, with ``draws`` attempts at most."""
    weights = _runs(mx.softmax(scores, axis=-1), LONG_RUN, 0)
    values = _runs(scores, LONG_RUN, -mx.inf)
    place = mx.arange(values.shape[1] * LONG_RUN).reshape(1, -1, LONG_RUN)
    left, sums = weights, weights.sum(axis=-1)
    total = sums.sum(axis=-1)
    enough = p[:, 0] * total
    found = mx.full(total.shape, -1, dtype=mx.int32)
    for own_key in mx.random.split(key, draws):
        token, weight = _draw_from_runs(left, sums, own_key)
        value = mx.take_along_axis(scores, token[:, None], axis=1)[..., None]
        above = (values > value) | ((values == value) & (place < token[:, None, None]))
        left = weights * above
        sums = left.sum(axis=-1)
        accepted = (found < 0) & (sums.sum(axis=-1) < enough) & (weight > 0)
        found = mx.where(accepted, token, found)
    return _or_token_zero(found, total)


def draw_top_k(
    scores: mx.array, k: mx.array, p: mx.array, largest_k: int, key: mx.array
) -> mx.array:
    """Draw from the nucleus of mass ``p [B, 1]`` of the ``k [B, 1]`` largest scores.

    ``largest_k``: the largest of ``k``.
    """
    runs = _runs(scores, SHORT_RUN, -mx.inf)
    tops = runs.max(axis=-1)
    # NaN breaks any order; such a row has no distribution and gives token 0 below.
    sound = mx.isfinite(tops.max(axis=-1, keepdims=True))
    count = min(largest_k + SPARE_TIES, tops.shape[1])
    negated = mx.where(sound, -tops, 0)
    chosen = mx.arange(count)[None] if count == tops.shape[1] else _smallest(negated, count)
    part = mx.take_along_axis(runs, chosen[..., None], axis=1).flatten(1)
    part = mx.where(sound, part, 0)
    places = (chosen[..., None] * SHORT_RUN + mx.arange(SHORT_RUN)).flatten(1)
    order = mx.argsort(-part, axis=-1)[:, : largest_k + SPARE_TIES]
    values = mx.take_along_axis(part, order, axis=1)
    least = mx.take_along_axis(values, k - 1, axis=1)
    kept = values >= least
    complete = (scores >= least).sum(axis=-1) == kept.sum(axis=-1)
    weights = mx.where(kept, mx.exp(values - values[:, :1]), 0)
    ends = mx.cumsum(weights, axis=-1)
    kept = kept & (ends - weights < p * ends[:, -1:])
    drawn = mx.random.categorical(mx.where(kept, values, -mx.inf), key=key)[:, None]
    token = mx.take_along_axis(
        mx.broadcast_to(places, part.shape), mx.take_along_axis(order, drawn, axis=1), axis=1
    )
    return mx.where(sound[:, 0], mx.where(complete, token[:, 0], -1), 0).astype(mx.int32)


def _smallest(values: mx.array, count: int) -> mx.array:
    """Return the indices of the ``count`` smallest values of each row, ascending."""
    return mx.sort(mx.argpartition(values, count - 1, axis=-1)[:, :count], axis=-1)


def _kth_largest(scores: mx.array, k: int) -> mx.array:
    """Return the k-th largest of each row, ``[B, 1]``."""
    at = scores.shape[-1] - k
    # NaN breaks any order; such a row has no distribution anyway.
    sound = mx.isfinite(scores.max(axis=-1, keepdims=True))
    return mx.partition(mx.where(sound, scores, 0), at, axis=-1)[:, at : at + 1]


def _runs(rows: mx.array, length: int, value: float) -> mx.array:
    """Return ``[B, V]`` as ``[B, N, length]``, the last run padded with ``value``."""
    short = -rows.shape[-1] % length
    if short:
        rows = mx.pad(rows, [(0, 0), (0, short)], constant_values=mx.array(value, rows.dtype))
    return rows.reshape(rows.shape[0], -1, length)


def _draw_from_runs(weights: mx.array, sums: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
    """Draw from ``weights [B, N, S]``, whose runs have ``sums [B, N]``.

    Returns tokens ``[B]`` and their weights; the weight is 0 if all weights of the row are.
    """
    points = mx.random.uniform(shape=(2, sums.shape[0], 1), key=key)
    run = _index_at(sums, points[0])
    inside = mx.take_along_axis(weights, run[..., None], axis=1)[:, 0]
    place = _index_at(inside, points[1])
    weight = mx.take_along_axis(inside, place, axis=1)
    return (run * weights.shape[-1] + place)[:, 0].astype(mx.int32), weight[:, 0]


def _index_at(weights: mx.array, point: mx.array) -> mx.array:
    """Return the index in ``weights [B, N]`` at the share ``point [B, 1]`` of their sum."""
    ends = mx.cumsum(weights, axis=-1)
    total = ends[:, -1:]
    at = mx.minimum(point * total, BELOW_ONE * total)
    passed = (ends <= at).sum(axis=-1, keepdims=True)
    return mx.minimum(passed, weights.shape[-1] - 1).astype(mx.int32)


def _or_token_zero(tokens: mx.array, total: mx.array) -> mx.array:
    """Return ``tokens [B]``, and 0 where the ``total`` of probabilities is NaN."""
    return mx.where(total > 0, tokens, 0).astype(mx.int32)
