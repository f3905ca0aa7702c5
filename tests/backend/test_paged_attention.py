"""Every way to read pages agrees with attention over the tokens themselves."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base, qwen3_next
from mlx_lm.models.cache import KVCache

from support import hybrid
from vllm_moe_compat.backend import attention_hook, paged_attention
from vllm_moe_compat.backend.attention import AttentionStep, PagedKV
from vllm_moe_compat.backend.batch import make_pass
from vllm_moe_compat.backend.forward import Forward
from vllm_moe_compat.backend.layers import AttentionLayer
from vllm_moe_compat.backend.page_pool import PagePool

HEADS, GROUP, DIM, BLOCK = 2, 3, 16, 8
DTYPES = (mx.float32, mx.bfloat16)
# Contexts behind the new token: at block edges, alone, even, ragged.
CONTEXTS = [[0], [7], [8], [9, 9], [0, 7, 8, 40], [64, 1], [23, 23, 23]]


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        # MLX's CPU gather_mm, and so this path, is float32 only.
        ("on_pool", mx.float32),
        *((path, dtype) for path in ("per_request", "gather") for dtype in DTYPES),
    ],
    ids=str,
)
@pytest.mark.parametrize("contexts", CONTEXTS, ids=str)
def test_paths_agree_with_attention_over_each_row(
    path: str, contexts: list[int], dtype: mx.Dtype
) -> None:
    mx.random.seed(1)
    draw = np.random.default_rng(1)
    layer = AttentionLayer(0, HEADS, DIM, dtype)
    need = [n // BLOCK + 1 for n in contexts]
    blocks = draw.permutation(np.arange(1, 1 + sum(need)))
    tables = np.zeros((len(contexts), max(need)), dtype=np.int64)
    for i, count in enumerate(need):
        tables[i, :count], blocks = blocks[:count], blocks[count:]
    pool = PagePool(1 + sum(need), 2 * HEADS * BLOCK * DIM * dtype.size, dtype)
    want = []
    queries = mx.random.normal((len(contexts), HEADS * GROUP, 1, DIM)).astype(dtype)
    fresh = []
    for i, n in enumerate(contexts):
        keys, values = (mx.random.normal((1, HEADS, n + 1, DIM)).astype(dtype) for _ in "kv")
        if n:
            behind = AttentionStep(np.array([0]), np.array([n]), tables[i : i + 1], BLOCK)
            PagedKV(layer, pool, behind).update_and_fetch(keys[:, :, :n], values[:, :, :n])
        want.append(
            mx.fast.scaled_dot_product_attention(queries[i : i + 1], keys, values, scale=0.3)
        )
        fresh.append((keys[:, :, n:], values[:, :, n:]))
    step = AttentionStep(np.array(contexts), np.ones(len(contexts), np.int64), tables, BLOCK)
    cache = PagedKV(layer, pool, step, asked=True)
    cache.update_and_fetch(*(mx.concatenate(list(x)) for x in zip(*fresh, strict=True)))
    found = paged_attention.PATHS[path](queries, pool, step, layer, 0.3)
    tolerance = 1e-5 if dtype == mx.float32 else 3e-2
    assert mx.allclose(found, mx.concatenate(want), atol=tolerance).item()
    assert cache.make_mask(1) is None


def step_of(contexts: list[int]) -> AttentionStep:
    width = max(contexts) // BLOCK + 1
    tables = np.ones((len(contexts), width), dtype=np.int64)
    return AttentionStep(np.array(contexts), np.ones(len(contexts), np.int64), tables, BLOCK)


def test_the_rule_looks_at_dtype_and_padding() -> None:
    assert paged_attention.path(step_of([4000, 4000]), mx.bfloat16) == "gather"
    assert paged_attention.path(step_of([4000, 100, 100]), mx.bfloat16) == "per_request"
    assert paged_attention.path(step_of([20, 1, 1]), mx.bfloat16) == "gather"
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    assert (paged_attention.path(step_of([40]), mx.float32) == "on_pool") == on_cpu


@pytest.fixture
def hooked() -> Iterator[ModuleType]:
    attention_hook.remove()
    yield qwen3_next
    attention_hook.remove()


def test_hook_replaces_the_served_model_s_function_alone(hooked: ModuleType) -> None:
    from mlx_lm.models import llama

    served = hybrid.model()
    assert attention_hook.install(served, [1, 3]) == {1, 3}
    assert attention_hook.install(served, [1, 3]) == {1, 3}
    assert hooked.scaled_dot_product_attention is attention_hook.attention
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    attention_hook.remove()
    assert hooked.scaled_dot_product_attention is base.scaled_dot_product_attention


def test_hook_leaves_mlx_lm_s_caches_alone(hooked: ModuleType) -> None:
    served = hybrid.model()
    tokens = mx.array([[3, 5, 7, 11]])
    before = served(tokens, cache=served.make_cache())
    attention_hook.install(served, [1, 3])
    assert mx.array_equal(served(tokens, cache=served.make_cache()), before).item()
    assert not hasattr(KVCache(), "attend")


def single(served: Any, prompt: list[int], count: int) -> list[int]:
    cache, out = served.make_cache(), []
    tokens = mx.array([prompt])
    for _ in range(count):
        token = int(mx.argmax(served(tokens, cache=cache)[0, -1]).item())
        out.append(token)
        tokens = mx.array([[token]])
    return out


@pytest.mark.parametrize("greedy", [True, False], ids=["ahead", "one by one"])
def test_tokens_are_those_of_single_sequences(greedy: bool) -> None:
    served = hybrid.model()
    rows = hybrid.requests([40, 17, 31, 5])
    forward = Forward(served, hybrid.memory(served, 1 << 20))
    hybrid.prefill(forward, rows)
    for _ in range(24):
        hybrid.decode(forward, rows, greedy=greedy)
    for row in rows:
        assert row.output == single(served, row.prompt, 24)
    assert (forward.hits > 10) == greedy


def test_a_pass_built_ahead_is_dropped_when_another_comes() -> None:
    served = hybrid.model()
    rows = hybrid.requests([40, 17, 31, 5])
    forward = Forward(served, hybrid.memory(served, 1 << 20))
    hybrid.prefill(forward, rows)
    hybrid.decode(forward, rows, greedy=True)
    # Fewer rows; then another token than the likeliest.
    hybrid.decode(forward, rows[:3], greedy=True)
    assert forward.hits == 0
    rows[0].output[-1] = (rows[0].output[-1] + 1) % hybrid.TEXT["vocab_size"]
    taken = rows[0].prompt + rows[0].output
    hybrid.decode(forward, rows[:3], greedy=True)
    assert forward.hits == 0
    hybrid.decode(forward, rows[:3], greedy=True)
    assert forward.hits == 1
    assert rows[0].output[-2:] == single(served, taken, 2)
    for row in rows[1:3]:
        assert row.output == single(served, row.prompt, len(row.output))


def test_logits_of_a_chosen_row_are_its_own() -> None:
    served = hybrid.model()
    rows = hybrid.requests([9, 6])
    forward = Forward(served, hybrid.memory(served, 1 << 20))
    work = make_pass([(row, 0, len(row.prompt)) for row in rows])
    logits = forward(work, [1])
    own = served(mx.array([rows[1].prompt]), cache=served.make_cache())
    assert mx.allclose(logits[0, :6], own[0], atol=1e-4).item()
