"""Prediction heads in float32 against vLLM's own definitions, and every deviation from them.

A release of each family is loaded by this package, target and head. Its texts are longer than
every window of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import make_prompt_cache

import vllm_moe_compat
from parity import released_heads, vllm_heads
from parity.family import VOCAB
from parity.reference import TOKENS
from vllm_moe_compat.backend.model.hidden_states import HiddenStates
from vllm_moe_compat.backend.model.prediction_heads import PredictionHeads
from vllm_moe_compat.load.prediction_heads import HeadParts, load_heads

DRAFTS = 4
TOLERANCE = 1e-5


@dataclasses.dataclass
class Made:
    """A release, both ways."""

    released: released_heads.Released
    definition: vllm_heads.Definition
    target: Any
    parts: HeadParts
    caches: Any

    def heads(self, **changes: Any) -> PredictionHeads:
        return PredictionHeads(self.target, dataclasses.replace(self.parts, **changes))


@pytest.fixture(scope="module", params=released_heads.HEADS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    released = released_heads.make(request.param)
    folder = released_heads.write(released, tmp_path_factory.mktemp("release"))
    with vllm_moe_compat.applied():
        target, _ = mlx_lm.utils.load_model(folder)
        parts = load_heads(folder, "float32", _evaluate)
        target.set_dtype(mx.float32)
        yield Made(released, vllm_heads.DEFINITIONS[request.param], target, parts, parts.model)


def _evaluate(model: Any) -> None:
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())


def expected(made: Made) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Logits of all positions but the last, logits of the drafts, and the drafted tokens."""
    with torch.no_grad():
        hidden = made.released.hidden_states(TOKENS)[:-1]
        ids = torch.tensor(TOKENS[1:])
        logits, handed_on = made.definition.run(made.released.head, ids, hidden)
        first, chain, drawn = logits, [], []
        for _ in range(DRAFTS):
            # Any tokens would do; these differ from those that the target would draw.
            drawn.append(int(logits[-1].argmax()))
            hidden = torch.cat([hidden, handed_on[-1:]])
            ids = torch.cat([ids, torch.tensor(drawn[-1:])])
            # A further draft is a further position; those before it stay what they are.
            logits, handed_on = made.definition.run(made.released.head, ids, hidden)
            chain.append(logits[-1].numpy())
    return first.numpy(), np.stack(chain), drawn


def found(made: Made, heads: PredictionHeads, drawn: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same on MLX: the text in two parts, then draft by draft."""
    with HiddenStates(made.target).during() as taken:
        made.target(mx.array([TOKENS]), cache=make_prompt_cache(made.target))
    hidden = taken.take()[:, :-1]
    cache = make_prompt_cache(made.parts.model)
    tokens, half = mx.array([TOKENS[1:]]), 20
    first, _ = heads(tokens[:, :half], hidden[:, :half], cache)
    second, handed_on = heads(tokens[:, half:], hidden[:, half:], cache)
    chain = []
    for token in drawn:
        logits, handed_on = heads(mx.array([[token]]), handed_on[:, -1:], cache)
        chain.append(logits[0, -1])
    return np.array(mx.concatenate([first, second], axis=1)[0]), np.array(mx.stack(chain))


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_logits_and_drafts_are_those_of_vllms_definition(made: Made) -> None:
    first, chain, drawn = expected(made)
    assert first.shape == (len(TOKENS) - 1, VOCAB)
    mine, drafts = found(made, made.heads(), drawn)
    assert distance(mine, first) < TOLERANCE
    assert distance(drafts, chain) < TOLERANCE


DEVIATIONS = {
    "the other order": lambda parts: {"embedding_first": not parts.embedding_first},
    "the first embedding": lambda parts: {"masks_first": not parts.masks_first},
    "the other hidden state": lambda parts: {"recycles_normed": not parts.recycles_normed},
    "no norm of the embedding": lambda parts: {"embedding_norm": lambda x: x},
    "no norm of the hidden state": lambda parts: {"hidden_norm": lambda x: x},
    "no norm of the result": lambda parts: {"norm": None},
}


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_a_head_that_deviates_is_told_apart(made: Made, deviation: str) -> None:
    """So the comparison above sees each of these."""
    first, chain, drawn = expected(made)
    changes = DEVIATIONS[deviation](made.parts)
    if made.parts.norm is None and deviation in ("the other hidden state", "no norm of the result"):
        pytest.skip("the family has no such norm")
    mine, drafts = found(made, made.heads(**changes), drawn)
    if deviation != "the other hidden state":
        assert distance(mine, first) > 100 * TOLERANCE
    assert distance(drafts, chain) > 100 * TOLERANCE or deviation == "the first embedding"
