"""Prediction heads in float32 against vLLM's own definitions, and every deviation from them.

A release of each family is loaded by this package, target and head. Its texts are longer than
every window of it.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import make_prompt_cache

import vllm_moe_compat
from parity import bailing_head, released_heads, vllm_heads
from parity.families import FAMILIES
from parity.family import VOCAB
from parity.reference import TOKENS
from vllm_moe_compat.backend.model.hidden_states import HiddenStates
from vllm_moe_compat.backend.model.prediction_heads import PredictionHeads
from vllm_moe_compat.load.prediction_heads import HeadParts, load_heads

DRAFTS = 4
# Of one head on the target's states, and of the last one of a chain.
TOLERANCE, OF_CHAINS = 3e-5, 3e-4
SEEN = 3e-3


@dataclasses.dataclass
class Made:
    """A release, both ways."""

    released: released_heads.Released
    definition: vllm_heads.Definition
    target: Any
    parts: HeadParts

    @functools.cached_property
    def expected(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Logits of all positions but the last, logits of the drafts, and the drafted tokens."""
        released, run = self.released, self.definition.run
        with torch.no_grad():
            hidden = released.hidden_states(TOKENS)[:-1]
            ids = torch.tensor(TOKENS[1:])
            logits, handed_on = run(released.head, ids, hidden)
            first, chain, drawn = logits, [], []
            for _ in range(DRAFTS):
                drawn.append(int(logits[-1].argmax()))
                hidden = torch.cat([hidden, handed_on[-1:]])
                ids = torch.cat([ids, torch.tensor(drawn[-1:])])
                # A further draft is a further position; those before it stay what they are.
                logits, handed_on = run(released.head, ids, hidden)
                chain.append(logits[-1].numpy())
        return first.numpy(), np.stack(chain), drawn

    @functools.cached_property
    def hidden(self) -> mx.array:
        """Hidden states ``[1, T, H]`` of the target on MLX."""
        with HiddenStates(self.target).during() as taken:
            self.target(mx.array([TOKENS]), cache=make_prompt_cache(self.target))
        hidden = taken.take()
        mx.eval(hidden)
        return hidden

    def heads(self, **changes: Any) -> PredictionHeads:
        return PredictionHeads(self.target, dataclasses.replace(self.parts, **changes))


FOUND = [name for name in released_heads.HEADS if name.partition(" ")[0] in FAMILIES]
if bailing_head.is_there():
    FOUND.append(bailing_head.NAME)
WITHOUT_NORM = {name for name, head in released_heads.HEADS.items() if "norm" not in head.parts}


@functools.cache
def make(name: str) -> Made:
    """Make and load a release with the head ``name``."""
    with tempfile.TemporaryDirectory() as place, vllm_moe_compat.applied():
        mlx_only = name == bailing_head.NAME
        released = bailing_head.make() if mlx_only else released_heads.make(name)
        folder = released_heads.write(released, Path(place))
        target, _ = mlx_lm.utils.load_model(folder)
        parts = load_heads(folder, "float32", _evaluate)
        _evaluate(target)
    return Made(released, vllm_heads.DEFINITIONS[released.family], target, parts)


def _evaluate(model: Any) -> None:
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())


def found(made: Made, heads: PredictionHeads, drawn: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same on MLX: the text in two parts, then draft by draft."""
    hidden = made.hidden[:, :-1]
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


@pytest.mark.parametrize("name", FOUND)
def test_logits_and_drafts_are_those_of_vllms_definition(name: str) -> None:
    made = make(name)
    first, chain, drawn = made.expected
    assert first.shape == (len(TOKENS) - 1, VOCAB)
    mine, drafts = found(made, made.heads(), drawn)
    assert distance(mine, first) < TOLERANCE
    assert distance(drafts, chain) < OF_CHAINS


DEVIATIONS = {
    "the other order": lambda parts: {"embedding_first": not parts.embedding_first},
    "the first embedding": lambda parts: {"masks_first": not parts.masks_first},
    "the other hidden state": lambda parts: {"recycles_normed": not parts.recycles_normed},
    "no norm of the embedding": lambda parts: {"embedding_norm": lambda x: x},
    "no norm of the hidden state": lambda parts: {"hidden_norm": lambda x: x},
    "no norm of the result": lambda parts: {"norm": None},
}


OF_THE_NORM = ("the other hidden state", "no norm of the result")


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        (name, deviation)
        for name in FOUND
        for deviation in DEVIATIONS
        if name not in WITHOUT_NORM or deviation not in OF_THE_NORM
        if " " not in name
    ],
)
def test_a_head_that_deviates_is_told_apart(name: str, deviation: str) -> None:
    """So the comparison above sees each of these."""
    made = make(name)
    first, chain, drawn = made.expected
    mine, drafts = found(made, made.heads(**DEVIATIONS[deviation](made.parts)), drawn)
    # The hidden state that is handed on shows in drafts only, the first embedding before them.
    if deviation == "the other hidden state":
        assert distance(drafts, chain) > SEEN
    else:
        assert distance(mine, first) > SEEN
