"""Hidden states taken out of a model's own pass, and what that leaves behind: nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from support import hybrid
from support.models import build_mlx
from vllm_moe_compat.backend.model import attention_hook, backbone
from vllm_moe_compat.backend.model.hidden_states import HiddenStates
from vllm_moe_compat.backend.pages import untouched
from vllm_moe_compat.backend.step.batch import Pass, make_pass
from vllm_moe_compat.backend.step.graph import GraphBuilder
from vllm_moe_compat.errors import UnsupportedServingError

TOKENS = mx.array([[3, 5, 7, 11, 2]])


def tied(name: str, **settings: Any) -> Any:
    """A small dense model whose embeddings are its head."""
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{name}")
    common = {
        "model_type": name,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 64,
        "tie_word_embeddings": True,
    }
    mx.random.seed(0)
    return module.Model(module.ModelArgs.from_dict(common | settings))


MODELS: dict[str, Callable[[], Any]] = {
    "nested": hybrid.model,
    "latent": lambda: build_mlx("deepseek_v3")[0],
    "scales": lambda: build_mlx("granitemoe")[0],
    "caps": lambda: tied("gemma2", head_dim=16, query_pre_attn_scalar=16),
    "tied and multiplies": lambda: tied("cohere", logit_scale=0.25, layer_norm_eps=1e-5),
    "names its argument": lambda: build_mlx("minimax_m2")[0],
    "layers elsewhere": lambda: build_mlx("nemotron_h")[0],
}


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_hidden_states(kind: str) -> None:
    """So they are the output of the final norm, and the head's scaling is the model's own."""
    model = MODELS[kind]()
    taking = HiddenStates(model)
    with taking.during() as taken:
        logits = model(TOKENS, cache=make_prompt_cache(model))
    hidden = taken.take()
    assert hidden.shape[:2] == TOKENS.shape
    assert mx.array_equal(backbone.output_head(model)(hidden), logits).item()
    assert not mx.array_equal(backbone.output_head(model)(hidden * 1.5), logits).item()


def test_heads_with_weights_of_their_own_scale_as_the_target_does() -> None:
    model = MODELS["scales"]()
    other = MODELS["scales"]().lm_head
    other.weight = other.weight[::-1]
    hidden = mx.random.normal((1, 3, 64))
    mine = backbone.output_head(model)(hidden)
    assert mx.allclose(
        backbone.output_head(model, other)(hidden), mine[..., ::-1], rtol=1e-5
    ).item()


def test_rows_of_a_padded_pass_have_the_states_of_each_alone() -> None:
    """In the graph that serves: paged caches, states, rows of several lengths."""
    model = hybrid.model()
    storage = hybrid.storage(model, 1 << 20)
    remove = attention_hook.install(model)
    rows = hybrid.requests([21, 5, 34])
    taking = HiddenStates(model)
    work = make_pass([(row, 0, len(row.prompt)) for row in rows])
    hidden = run(taking, GraphBuilder(model, storage), work)
    for row, request in enumerate(rows):
        alone = backbone.of_model(model)(mx.array([request.prompt]), make_prompt_cache(model))
        found = hidden[row, : len(request.prompt)]
        assert np.allclose(found, alone[0], atol=2e-5 * float(mx.abs(alone).max()))
    remove()


def test_pools_are_still_written_in_place() -> None:
    """Neither the hook nor the states that were taken hold the graph of a pass."""
    model = hybrid.model()
    storage = hybrid.storage(model, 1 << 20)
    remove = attention_hook.install(model)
    taking, builder = HiddenStates(model), GraphBuilder(model, storage)
    rows = hybrid.requests([32, 32])
    addresses, kept = set(), []
    gc.disable()  # Nothing may hang on a collection.
    try:
        # From the second pass on, keys are read from the pages.
        for start in range(0, 32, 8):
            kept.append(run(taking, builder, make_pass([(row, start, 8) for row in rows])))
            addresses.add(tuple(untouched.address(pool.pages) for pool in builder._pools))
    finally:
        gc.enable()
    assert len(addresses) == 1
    remove()


def run(taking: HiddenStates, builder: GraphBuilder, work: Pass) -> mx.array:
    """Run a pass as ``Forward`` does; return its hidden states."""
    states = builder.take_states(work)
    with taking.during() as taken:
        tokens = mx.array(work.tokens)
        graph = builder.build(tokens, builder.metadata(work), states, work.lengths)
    builder.storage.states.put_in(work.req_ids, graph.states)
    hidden = taken.take()
    mx.eval(graph.written, hidden)
    return hidden


def test_a_model_is_as_it_was_after_a_pass_and_after_a_failure() -> None:
    model = hybrid.model()
    kind = type(backbone.of_model(model))
    taking = HiddenStates(model)
    assert type(backbone.of_model(model)) is kind
    with taking.during() as taken, pytest.raises(IndexError):
        model(TOKENS, cache=[])
    assert type(backbone.of_model(model)) is kind
    with pytest.raises(RuntimeError, match="0 passes were built"):
        taken.take()
    with taking.during() as taken:
        model(TOKENS, cache=make_prompt_cache(model))
        model(TOKENS, cache=make_prompt_cache(model))
    with pytest.raises(RuntimeError, match="2 passes were built"):
        taken.take()


def test_a_backbone_that_returns_something_else_is_refused() -> None:
    model = hybrid.model()
    kept = backbone.of_model(model)
    kind = type(kept)

    class Pair(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **options: Any) -> Any:
            hidden = super().__call__(*args, **options)
            return hidden[:, 0]

    kept.__class__ = Pair
    with pytest.raises(UnsupportedServingError, match="does not return hidden states"):
        HiddenStates(model)
