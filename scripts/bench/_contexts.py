"""What a long prompt leaves behind, without computing the prompt.

Decode speed depends on how much a request has behind it and not on what. A
prompt's keys, values and states are drawn at random, the same for both sides,
and put where each of them keeps them: into mlx-lm's caches, and through the
backend's own caches into its pages and resident states. The requests are
otherwise ordinary ones, and both sides must then generate the same tokens.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vllm_moe_compat.backend.attention import AttentionStep, PagedKV
from vllm_moe_compat.backend.layers import AttentionLayer, Layer

# Per layer: keys and values [1, H, n, D], or convolution tail and state.
Context = list[tuple[mx.array, mx.array]]


def draw(layers: list[Layer], tokens: int, seed: int) -> Context:
    """What ``tokens`` tokens leave in every layer."""
    mx.random.seed(seed)
    context = []
    for layer in layers:
        if isinstance(layer, AttentionLayer):
            shape = (1, layer.kv_heads, tokens, layer.head_dim)
            keys = mx.random.normal(shape, dtype=layer.dtype)
            context.append((keys, 0.5 * mx.random.normal(shape, dtype=layer.dtype)))
        else:
            tail = mx.random.normal((1, *layer.conv_shape), dtype=layer.conv_dtype)
            state = mx.random.normal((1, *layer.state_shape), dtype=layer.state_dtype)
            context.append((0.5 * tail, 0.1 * state))
    mx.eval(context)
    return context


def as_prompt_cache(model: Any, context: Context) -> list[Any]:
    """mlx-lm's caches of one sequence, filled."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    for cache, (first, second) in zip(caches, context, strict=True):
        if isinstance(cache, KVCache):
            cache.update_and_fetch(first, second)
        else:
            cache.cache = [first, second]
    return list(caches)


def instead_of_prefills(runner: Any, contexts: dict[int, Context]) -> Any:
    """A ``forward`` for ``runner`` that takes prompts from ``contexts``.

    By their first token: the token ids of the benchmark's prompts begin with
    the number of the request. Passes that compute logits go to the model.
    """
    forward, memory = runner.forward, runner.memory

    def fill(work: Any, rows: Any) -> mx.array:
        if rows:
            logits: mx.array = forward(work, rows)
            return logits
        for request, start, count in zip(work.requests, work.offsets, work.lengths, strict=True):
            _fill_one(memory, request, int(start), int(count), contexts[request.prompt[0]])
        return mx.zeros((0,))

    return fill


def _fill_one(memory: Any, request: Any, start: int, count: int, context: Context) -> None:
    states = []
    for layer, (first, second) in zip(memory.layers, context, strict=True):
        if not isinstance(layer, AttentionLayer):
            states.append((mx.array(first), mx.array(second)))
            continue
        group = memory.groups[layer.index]
        block = memory.block_sizes[group]
        table = np.asarray([request.blocks[group]], dtype=np.int64)
        step = AttentionStep(np.asarray([start]), np.asarray([count]), table, block)
        pool = memory.pools[layer.index]
        chunk = slice(start, start + count)
        PagedKV(layer, pool, step).update_and_fetch(first[:, :, chunk], second[:, :, chunk])
        mx.eval(pool.pages)
    memory.states.drop({request.req_id})
    mx.eval(states)
    memory.states.put_in([request.req_id], states)
