"""A model in ranges of its layers gives the logits of the whole model, with its caches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from support import models, ranks
from support.layer_ranges import Hand
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.ranks import pipeline

# Softmax, windows beside full layers, latent attention, states beside attention, chunks.
DAILY = ("qwen3_moe", "gpt_oss", "deepseek_v3", "jamba", "llama4")
# Layers hand on keys and values too, or some have no cache.
REFUSED = ("gemma4_text", "gemma4_text, k = v", "gemma4_text, shared keys", "nemotron_h")
FULL = [kind for kind in models.MODULE_PATHS if kind not in (*DAILY, *REFUSED)]


def cut(kind: str, ends: Sequence[int]) -> list[Any]:
    """The same model for every range."""
    found = []
    for begin, end in zip((0, *ends), ends, strict=False):
        model, _ = models.build_mlx(kind)
        pipeline.keep_range(model, begin, end, Hand())
        found.append(model)
    return found


def run(stages: list[Any], tokens: mx.array, caches: list[Any]) -> mx.array:
    for number, (stage, own) in enumerate(zip(stages, caches, strict=True)):
        hand = stage.moe_compat_stage.transport
        if number:
            hand.taken = stages[number - 1].moe_compat_stage.transport.given[-1]
        logits: mx.array = stage(tokens, cache=own)
    return logits


@pytest.mark.parametrize(
    "kind", [*DAILY, *(pytest.param(kind, marks=pytest.mark.full) for kind in FULL)]
)
def test_ranges_together_are_the_whole_model(kind: str) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    whole, _ = models.build_mlx(kind)
    count = len(whole.layers)
    ends = (1, count - 1, count) if count > 2 else (1, count)
    stages = cut(kind, ends)
    cache, caches = make_prompt_cache(whole), [make_prompt_cache(stage) for stage in stages]
    assert sum(len(own) for own in caches) == count
    for tokens in ([[5, 6, 7, 8, 9]], [[10]], [[11, 12, 13]], [[14]]):
        asked = mx.array(tokens)
        assert mx.array_equal(run(stages, asked, caches), whole(asked, cache=cache)), tokens


def test_a_range_has_the_weights_of_its_layers_only() -> None:
    whole, _ = models.build_mlx("qwen3_moe")
    sizes = [sum(a.nbytes for _, a in tree_flatten(x.parameters())) for x in whole.layers]
    rest = sum(a.nbytes for _, a in tree_flatten(whole.parameters())) - sum(sizes)
    first, second = cut("qwen3_moe", (1, len(sizes)))
    for stage, wanted in ((first, sizes[:1]), (second, sizes[1:])):
        held = sum(a.nbytes for _, a in tree_flatten(stage.parameters()))
        assert held == rest + sum(wanted)


@pytest.mark.parametrize("layers", [(0, 2), (2, 4)], ids=["first", "last"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_divided_is_refused(kind: str, layers: tuple[int, int]) -> None:
    whole, _ = models.build_mlx(kind)

    def compute() -> None:
        pipeline.keep_range(whole, *layers, Hand())
        whole(mx.array([[1, 2]]), cache=whole.make_cache())

    with pytest.raises(UnsupportedServingError, match="cannot be divided into ranges of layers"):
        compute()


def test_every_rank_needs_a_layer() -> None:
    whole, _ = models.build_mlx("qwen3_moe")
    with pytest.raises(UnsupportedServingError, match="every rank needs one"):
        pipeline.keep_range(whole, 2, 2, Hand())


@pytest.mark.full
@pytest.mark.parametrize(("kind", "count"), [("jamba", 2), ("gpt_oss", 4)])
def test_ranks_over_the_ring_have_the_logits_of_the_whole_model(
    kind: str, count: int, tmp_path: Path
) -> None:
    assert ranks.run("support.rank_range", tmp_path, count, kind) == [[True] * 5] * count
