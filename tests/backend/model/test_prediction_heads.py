"""Prediction heads on pages, against the same heads on mlx-lm's own caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support import prediction_heads
from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.model.prediction_heads import PredictionHeads

KINDS = {
    "softmax": prediction_heads.gated_delta,
    "latent": prediction_heads.latent,
    "windowed": prediction_heads.windowed,
}
LENGTHS = [21, 1, 34]


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Any:
    target, heads = KINDS[request.param]()
    remove = attention_hook.install(heads)
    yield target, heads
    remove()


def inputs(heads: PredictionHeads, count: int) -> tuple[mx.array, mx.array]:
    """Tokens ``[B, count]`` and hidden states ``[B, count, H]`` of ``LENGTHS`` rows."""
    mx.random.seed(2)
    tokens = mx.random.randint(0, 90, (len(LENGTHS), count))
    return tokens, mx.random.normal((*tokens.shape, heads.norm.weight.shape[0]))


def test_rows_on_pages_are_those_on_mlx_lms_caches(made: Any) -> None:
    """A padded prompt, a chunk, drafts of one token, and several tokens at once, as verified."""
    _, heads = made
    passes = [LENGTHS, [7, 16, 2], [1, 1, 1], [3, 3, 3], [1, 1, 1]]
    tokens, hidden = inputs(heads, 64)
    pages = prediction_heads.Pages(heads.layers, len(LENGTHS), 64)
    alone = [make_own(heads) for _ in LENGTHS]
    at = [0, 0, 0]
    for lengths in passes:
        width = max(lengths)
        rows = [slice(a, a + width) for a in at]
        logits, after = heads(
            mx.stack([tokens[row, part] for row, part in enumerate(rows)]),
            mx.stack([hidden[row, part] for row, part in enumerate(rows)]),
            pages.caches(at, lengths),
        )
        pages.evaluate(logits, after)
        for row, count in enumerate(lengths):
            part = slice(at[row], at[row] + count)
            expected = heads(tokens[row : row + 1, part], hidden[row : row + 1, part], alone[row])
            for found, right in zip((logits, after), expected, strict=True):
                error = mx.abs(found[row, :count] - right[0]).max() / mx.abs(right).max()
                assert error.item() < 1e-5
            at[row] += count


def make_own(heads: PredictionHeads) -> list[Any]:
    """Caches as mlx-lm makes them."""
    from mlx_lm.models.cache import KVCache

    return [KVCache() for _ in heads.layers]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masks", [True, False])
def test_the_first_embedding_counts_as_zeros_where_the_family_says_so(
    kind: str, masks: bool
) -> None:
    """At position 0 of a text only, whatever the row begins with in a pass."""
    _, heads = KINDS[kind](masks_first=masks)
    tokens, hidden = inputs(heads, 4)
    other = mx.concatenate([tokens[:, :1] + 1, tokens[:, 1:]], axis=1)
    pages = [prediction_heads.Pages(heads.layers, len(LENGTHS), 64) for _ in range(2)]
    for offsets in ([0, 5, 0], [4, 9, 4]):
        pair = []
        for mine, given in zip(pages, (tokens, other), strict=True):
            logits, _ = heads(given, hidden, mine.caches(offsets, [4, 4, 4]))
            mine.evaluate(logits)
            pair.append(np.array(logits))
        same = [bool((a == b).all()) for a, b in zip(*pair, strict=True)]
        assert same == [masks and offset == 0 for offset in offsets]
        pages = [prediction_heads.Pages(heads.layers, len(LENGTHS), 64) for _ in range(2)]


def test_a_head_holds_no_weights_of_its_target(made: Any) -> None:
    """They would be counted, cast and dropped twice."""
    target, heads = made
    shared = {id(array) for _, array in tree_flatten(target.parameters())}
    mine = dict(tree_flatten(heads.parameters()))
    assert shared.isdisjoint(id(array) for array in mine.values())


def test_weights_that_the_target_gets_later_are_used(made: Any) -> None:
    target, heads = made
    tokens, hidden = inputs(heads, 3)
    before, _ = heads(tokens, hidden, make_own(heads))
    owner = getattr(target, "language_model", target)
    owner.lm_head.weight = 2 * owner.lm_head.weight
    after, _ = heads(tokens, hidden, make_own(heads))
    assert mx.allclose(after, 2 * before, rtol=1e-5).item()


def test_caches_are_described_as_pages_need_them() -> None:
    (softmax,) = prediction_heads.gated_delta()[1].layers
    assert (softmax.kv_heads, softmax.head_dim, softmax.value_dim) == (2, 32, None)
    assert softmax.attends_itself
    assert not softmax.single_sequence
    (latent,) = prediction_heads.latent()[1].layers
    assert (latent.kv_heads, latent.head_dim, latent.value_dim) == (1, 32, 16)
    (windowed,) = prediction_heads.windowed()[1].layers
    assert windowed.window == 16


def test_recycled_states_are_those_before_or_after_the_norm() -> None:
    results: dict[bool, Any] = {}
    for normed in (True, False):
        _, heads = prediction_heads.gated_delta(recycles_normed=normed)
        tokens, hidden = inputs(heads, 3)
        results[normed] = heads(tokens, hidden, make_own(heads))
    (logits, normed_state), (same, raw) = results[True], results[False]
    assert mx.array_equal(logits, same).item()
    assert mx.array_equal(heads.norm(raw), normed_state).item()
    assert not mx.allclose(raw, normed_state, rtol=1e-2).item()
