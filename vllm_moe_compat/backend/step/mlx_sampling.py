"""Drawing tokens in MLX: temperature, top-k and top-p, and nothing else.

In: logits ``[B, V]`` where they are. Out: tokens ``[B]``, from the distribution that
vLLM's sampler draws from: divide by the temperature, keep what is no less than the
k-th largest, of that the fewest tokens whose probabilities reach p, draw. Only the
tokens leave MLX. Each row goes one of four ways, since sorting a vocabulary is what
takes a sampler's time (on MLX's CPU build 14 ms for 152k tokens, in torch 20 ms):

* **greedy**: the first of the largest, as in torch; also for a top-p of less than 1/V.
* **head**, for a top-k of up to ``HEAD``: the vocabulary is cut into runs of 16. The
  largest n tokens lie in the n runs with the largest maxima, so n short runs are sorted
  and the rest is thrown away.
* **whole**: from the whole vocabulary by its cumulative sum, first which run of
  tokens, then which token in it. Two short sums instead of a long one: they round
  less, and take two random numbers instead of one for each token.
* **nucleus**, for top-p: by rejection, without sorting. A token belongs to the nucleus
  if what is more likely than it has less than p together. One is drawn from the whole;
  if it does not belong, neither does anything less likely, and the next is drawn from
  what is more likely. Whatever is accepted follows the nucleus' own distribution.

A row may stay undecided, as token -1: rejected as often as was provided for (in less
than one case in a hundred), or more tokens equal to the k-th largest than the head
holds. ``settle`` draws those, one by one. A row that has no distribution, because of a
NaN, of +inf or of -inf everywhere, gives token 0, as vLLM's does.

Of equally likely tokens at the edge of a nucleus, vLLM keeps as many as it takes,
whichever its sort puts last; here it is the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

# The largest top-k for which short runs are sorted, and how many of them there are
# beyond k, for tokens that equal the k-th.
HEAD, SPARE = 1024, 64
SHORT, LONG = 16, 256
# Rejection: how rarely a row may be left undecided.
UNDECIDED = 0.01
# The largest float below one.
BELOW_ONE = 1 - 2**-24


@dataclass(frozen=True, slots=True)
class Wish:
    """What a row asks for; ``temperature`` 0 is greedy, ``top_k`` 0 and ``top_p`` 1 mean all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(slots=True)
class _Group:
    """Rows that go the same way, and their parameters as columns ``[b, 1]``."""

    rows: list[int]
    index: mx.array
    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    most: int  # largest top_k
    tries: int


@dataclass
class Draw:
    """How a batch is drawn from, worked out once for as long as it stays the same."""

    wishes: Sequence[Wish]
    vocab: int
    _groups: dict[str, _Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ways = [self._way(wish) for wish in self.wishes]
        for way in ("greedy", "head", "nucleus", "whole", "later"):
            rows = [row for row, found in enumerate(ways) if found == way]
            if rows:
                self._groups[way] = _group(rows, [self.wishes[row] for row in rows])
        order = [row for group in self._groups.values() for row in group.rows]
        self._back = mx.array(np.argsort(order).astype(np.uint32))

    def _way(self, wish: Wish) -> str:
        # The likeliest token alone is a nucleus of 1/V.
        if wish.temperature == 0 or wish.top_p * self.vocab <= 1:
            return "greedy"
        if 0 < wish.top_k < self.vocab:
            return "head" if wish.top_k <= HEAD else "later"
        return "nucleus" if wish.top_p < 1 else "whole"

    def __call__(self, logits: mx.array, key: mx.array) -> mx.array:
        """Tokens ``[B]`` of int32 for ``logits [B, V]``, -1 for the undecided; lazy."""
        found = []
        keys = mx.random.split(key, len(self._groups)) if len(self._groups) > 1 else [key]
        for (way, group), own in zip(self._groups.items(), keys, strict=True):
            part = logits if len(self._groups) == 1 else logits[group.index]
            if way == "greedy":
                tokens = mx.argmax(part, axis=-1).astype(mx.int32)
            elif way == "later":
                tokens = mx.full((len(group.rows),), -1, dtype=mx.int32)
            else:
                scores = part.astype(mx.float32) / group.temperature
                if way == "head":
                    tokens = head(scores, group.top_k, group.top_p, group.most, own)
                elif way == "nucleus":
                    tokens = nucleus(scores, group.top_p, group.tries, own)
                else:
                    tokens = whole(scores, own)
            found.append(tokens)
        return found[0] if len(found) == 1 else mx.concatenate(found)[self._back]

    def settle(self, logits: mx.array, tokens: list[int], key: mx.array) -> list[int]:
        """``tokens`` with those that were left undecided drawn, from the same ``logits``."""
        settled = list(tokens)
        for row, token in enumerate(tokens):
            if token >= 0:
                continue
            wish = self.wishes[row]
            scores = logits[row : row + 1].astype(mx.float32) / wish.temperature
            if 0 < wish.top_k < self.vocab:
                scores = mx.where(scores >= _largest(scores, wish.top_k), scores, -mx.inf)
            while settled[row] < 0:
                key, own = mx.random.split(key)
                p = mx.array([[wish.top_p]])
                drawn = nucleus(scores, p, tries(wish.top_p), own)
                settled[row] = int(np.array(drawn)[0])
        return settled


def _group(rows: list[int], wishes: Sequence[Wish]) -> _Group:
    def column(values: list[Any], dtype: mx.Dtype) -> mx.array:
        return mx.array(values, dtype=dtype)[:, None]

    top_k = [wish.top_k for wish in wishes]
    return _Group(
        rows,
        mx.array(rows, dtype=mx.uint32),
        column([wish.temperature for wish in wishes], mx.float32),
        column(top_k, mx.int32),
        column([wish.top_p for wish in wishes], mx.float32),
        max(top_k),
        max(tries(wish.top_p) for wish in wishes),
    )


def tries(p: float) -> int:
    """How many draws by rejection leave a row undecided in less than 1 case in 100.

    Every rejection leaves a uniformly distributed share of the mass, so the number of
    rejections before the share is below p is Poisson, with mean ln(1/p).
    """
    mean = -math.log(p)
    count, term = 0, math.exp(-mean)
    left = 1 - term
    while left >= UNDECIDED:
        count += 1
        term *= mean / count
        left -= term
    return count + 1


def whole(scores: mx.array, key: mx.array) -> mx.array:
    """Draw from softmax of ``scores [B, V]``."""
    weights = _runs(mx.softmax(scores, axis=-1), LONG, 0)
    sums = weights.sum(axis=-1)
    token, weight = _choose(weights, sums, key)
    return _checked(mx.where(weight > 0, token, -1), sums.sum(axis=-1))


def nucleus(scores: mx.array, p: mx.array, times: int, key: mx.array) -> mx.array:
    """Draw from the nucleus of mass ``p [B, 1]``, by at most ``times`` rejections."""
    weights = _runs(mx.softmax(scores, axis=-1), LONG, 0)
    values = _runs(scores, LONG, -mx.inf)
    place = mx.arange(values.shape[1] * LONG).reshape(1, -1, LONG)
    left, sums = weights, weights.sum(axis=-1)
    total = sums.sum(axis=-1)
    enough = p[:, 0] * total
    found = mx.full(total.shape, -1, dtype=mx.int32)
    for own in mx.random.split(key, times):
        token, weight = _choose(left, sums, own)
        value = mx.take_along_axis(scores, token[:, None], axis=1)[..., None]
        above = (values > value) | ((values == value) & (place < token[:, None, None]))
        left = weights * above
        sums = left.sum(axis=-1)
        accepted = (found < 0) & (sums.sum(axis=-1) < enough) & (weight > 0)
        found = mx.where(accepted, token, found)
    return _checked(found, total)


def head(scores: mx.array, k: mx.array, p: mx.array, most: int, key: mx.array) -> mx.array:
    """Draw from the ``k [B, 1]`` largest, of those from the nucleus of mass ``p [B, 1]``.

    ``most``: the largest of ``k``.
    """
    runs = _runs(scores, SHORT, -mx.inf)
    tops = runs.max(axis=-1)
    # NaN has no place in an order.
    sound = mx.isfinite(tops.max(axis=-1, keepdims=True))
    count = min(most + SPARE, tops.shape[1])
    negated = mx.where(sound, -tops, 0)
    chosen = mx.arange(count)[None] if count == tops.shape[1] else _smallest(negated, count)
    part = mx.take_along_axis(runs, chosen[..., None], axis=1).flatten(1)
    part = mx.where(sound, part, 0)
    places = (chosen[..., None] * SHORT + mx.arange(SHORT)).flatten(1)
    order = mx.argsort(-part, axis=-1)[:, : most + SPARE]
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
    """Where the ``count`` smallest of each row are, in the order of their places."""
    return mx.sort(mx.argpartition(values, count - 1, axis=-1)[:, :count], axis=-1)


def _largest(scores: mx.array, k: int) -> mx.array:
    """The k-th largest of each row, ``[B, 1]``."""
    at = scores.shape[-1] - k
    # NaN has no place in an order; such a row has no distribution anyway.
    sound = mx.isfinite(scores.max(axis=-1, keepdims=True))
    return mx.partition(mx.where(sound, scores, 0), at, axis=-1)[:, at : at + 1]


def _runs(rows: mx.array, length: int, value: float) -> mx.array:
    """``[B, V]`` as ``[B, N, length]``, the last run filled up with ``value``."""
    short = -rows.shape[-1] % length
    if short:
        rows = mx.pad(rows, [(0, 0), (0, short)], constant_values=mx.array(value, rows.dtype))
    return rows.reshape(rows.shape[0], -1, length)


def _choose(weights: mx.array, sums: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
    """Draw from ``weights [B, N, S]``, whose runs have ``sums [B, N]``.

    Returns tokens ``[B]`` and their weights, 0 where there is nothing to draw from.
    """
    points = mx.random.uniform(shape=(2, sums.shape[0], 1), key=key)
    run = _where(sums, points[0])
    inside = mx.take_along_axis(weights, run[..., None], axis=1)[:, 0]
    place = _where(inside, points[1])
    weight = mx.take_along_axis(inside, place, axis=1)
    return (run * weights.shape[-1] + place)[:, 0].astype(mx.int32), weight[:, 0]


def _where(weights: mx.array, point: mx.array) -> mx.array:
    """Which of ``weights [B, N]`` the share ``point [B, 1]`` of their sum falls into."""
    ends = mx.cumsum(weights, axis=-1)
    total = ends[:, -1:]
    at = mx.minimum(point * total, BELOW_ONE * total)
    passed = (ends <= at).sum(axis=-1, keepdims=True)
    return mx.minimum(passed, weights.shape[-1] - 1).astype(mx.int32)


def _checked(tokens: mx.array, total: mx.array) -> mx.array:
    """``tokens [B]``, and 0 where the ``total`` of probabilities is no number."""
    return mx.where(total > 0, tokens, 0).astype(mx.int32)
