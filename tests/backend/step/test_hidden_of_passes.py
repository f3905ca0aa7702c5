"""Passes of every kind give the hidden states that prediction heads continue from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from support import compiled, hybrid, models
from vllm_moe_compat.backend.model import backbone
from vllm_moe_compat.backend.model.hidden_states import HiddenStates
from vllm_moe_compat.backend.step import compiled_decode, self_check
from vllm_moe_compat.backend.step.batch import Pass, Request
from vllm_moe_compat.backend.step.forward import Forward

POOL_BYTES = 8 << 20


@pytest.fixture(scope="module")
def model() -> Any:
    return hybrid.model()


def made(model: Any, **settings: Any) -> Forward:
    forward = Forward(model, hybrid.storage(model, POOL_BYTES), **settings)
    forward.keep_hidden(HiddenStates(model))
    return forward


def assert_hidden(forward: Forward, passes: int) -> None:
    """What mlx-lm's own caches give for each position of the passes since the last call."""
    own_backbone = backbone.of_model(forward.model)
    taken = forward.take_hidden()
    assert len(taken) == passes
    for work, hidden in taken:
        mx.eval(hidden)
        for row, request in enumerate(work.requests):
            start, length = int(work.offsets[row]), int(work.lengths[row])
            known = request.tokens(0, start) + work.tokens[row, :length].tolist()
            cache = make_prompt_cache(forward.model)
            own = own_backbone(mx.array([known]), cache=cache)[0, start:]
            assert mx.allclose(hidden[row, :length], own, atol=1e-3), request.req_id


def test_prompts_and_single_tokens(model: Any) -> None:
    forward = made(model)
    rows = hybrid.requests([40, 17, 33, 5])
    hybrid.prefill(forward, rows)
    assert_hidden(forward, 1)
    hybrid.decode(forward, rows)
    assert_hidden(forward, 1)
    forward.close()


def test_rows_that_are_computed_one_by_one(model: Any) -> None:
    storage = hybrid.storage(model, POOL_BYTES)
    layers = [
        replace(layer, single_sequence=True) if hasattr(layer, "kv_heads") else layer
        for layer in storage.layers
    ]
    storage.layers = layers
    forward = Forward(model, storage)
    forward.keep_hidden(HiddenStates(model))
    rows = hybrid.requests([9, 4])
    hybrid.prefill(forward, rows)
    assert_hidden(forward, 2)
    forward.close()


@pytest.mark.parametrize(
    "compiles",
    [
        pytest.param(False, id="plain"),
        pytest.param(True, id="compiled", marks=compiled.same_bits),
    ],
)
def test_passes_that_are_built_early(
    model: Any, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_decode, "PASSES_BEFORE_COMPILING", 2)
    forward = made(model, compiles=compiles)
    rows = hybrid.requests([40, 17])
    hybrid.prefill(forward, rows)
    forward.take_hidden()
    for _ in range(10):
        hybrid.decode(forward, rows, greedy=True)
        assert_hidden(forward, 1)
    assert forward.hits > 0
    assert (forward.compiled.passes > 0) == compiles
    forward.close()


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_a_pass_that_verifies_drafts(name: str) -> None:
    served, _ = models.build_mlx(name)
    forward = Forward(served, hybrid.softmax_storage(served, POOL_BYTES))
    forward.keep_hidden(HiddenStates(served))
    rows = hybrid.softmax_requests(forward.storage, [20, 7])
    hybrid.prefill(forward, rows)
    forward.take_hidden()
    forward.verify(verifying(rows, [3, 1]))
    assert_hidden(forward, 1)
    forward.accept({row.req_id: 1 for row in rows})
    forward.close()


def test_the_self_check_leaves_none(model: Any) -> None:
    forward = made(model)
    self_check.run(forward)
    assert forward.take_hidden() == []
    forward.close()


def test_without_heads_nothing_is_kept(model: Any) -> None:
    forward = Forward(model, hybrid.storage(model, POOL_BYTES))
    hybrid.prefill(forward, hybrid.requests([9]))
    assert forward.take_hidden() == []
    forward.close()


def verifying(rows: list[Request], counts: list[int]) -> Pass:
    lengths = np.asarray([1 + count for count in counts], dtype=np.int64)
    tokens = np.full((len(rows), int(lengths.max())), 3, dtype=np.int32)
    tokens[:, 0] = [row.tokens(row.num_tokens - 1, 1)[0] for row in rows]
    offsets = np.asarray([row.num_tokens - 1 for row in rows], dtype=np.int64)
    return Pass(tuple(rows), tokens, offsets, lengths, verifies=True)
