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

from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer
from vllm_moe_compat.backend.pages.paged_kv import PagedKV

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
            tail, state = (
                mx.random.normal((1, *shape), dtype=dtype)
                for shape, dtype in zip(layer.shapes, layer.dtypes, strict=True)
            )
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
    """Computes no prompt that ``contexts`` knows but takes what it leaves from there.

    By its first token: prompts of the benchmark begin with their number.
    """
    compute = runner._prefill

    def fill(work: Any) -> None:
        if work.requests[0].prompt[0] not in contexts:
            compute(work)
            return
        for request, start, count in zip(work.requests, work.offsets, work.lengths, strict=True):
            context = contexts[request.prompt[0]]
            _fill_one(runner.storage, request, int(start), int(count), context)

    return fill


def _fill_one(storage: Any, request: Any, start: int, count: int, context: Context) -> None:
    states = []
    for layer, (first, second) in zip(storage.layers, context, strict=True):
        if not isinstance(layer, AttentionLayer):
            states.append((mx.array(first), mx.array(second)))
            continue
        group = storage.groups[layer.index]
        block = storage.block_sizes[group]
        table = np.asarray([request.blocks[group]], dtype=np.int64)
        metadata = AttentionMetadata(np.asarray([start]), np.asarray([count]), table, block)
        pool = storage.pools[layer.index]
        chunk = slice(start, start + count)
        PagedKV(layer, pool, metadata).update_and_fetch(first[:, :, chunk], second[:, :, chunk])
        mx.eval(pool.pages)
    storage.states.drop({request.req_id})
    mx.eval(states)
    storage.states.put_in([request.req_id], states)
