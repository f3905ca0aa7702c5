"""A small hybrid model straight from mlx-lm's class, and pools of any size for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Request, make_pass

BLOCK = 16
TEXT = {
    "model_type": "qwen3_5_moe_text",
    "full_attention_interval": 2,
    "head_dim": 32,
    "hidden_size": 64,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_value_head_dim": 16,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000,
        "rope_type": "default",
    },
    "shared_expert_intermediate_size": 32,
    "tie_word_embeddings": False,
    "vocab_size": 96,
}


def model(seed: int = 0, dtype: mx.Dtype = mx.float32) -> Any:
    """Two gated-delta and two softmax layers with peaked random weights."""
    from mlx_lm.models.qwen3_5 import Model, ModelArgs

    mx.random.seed(seed)
    text = TEXT | {"rope_parameters": dict(TEXT["rope_parameters"])}
    built = Model(ModelArgs.from_dict({"model_type": "qwen3_5_moe", "text_config": text}))
    built.update(tree_map(lambda x: (x * 3 if x.ndim > 1 else x).astype(dtype), built.parameters()))
    mx.eval(built.parameters())
    return built


def storage(served: Any, pool_bytes: int) -> LayerStorage:
    """Two pools, each shared by a softmax and a gated-delta layer, as vLLM plans them."""
    layers = describe(served)
    softmax = next(x for x in layers if isinstance(x, AttentionLayer))
    page = 2 * softmax.kv_heads * softmax.head_dim * softmax.dtype.size * BLOCK
    pools = [PagePool(pool_bytes // page, page, softmax.dtype) for _ in range(2)]
    seen = {True: 0, False: 0}
    mine, groups = {}, {}
    for layer in layers:
        kind = isinstance(layer, AttentionLayer)
        mine[layer.index], groups[layer.index] = pools[seen[kind]], int(kind)
        seen[kind] += 1
    mx.eval([pool.pages for pool in pools])
    return LayerStorage(layers, mine, groups, [4096, BLOCK], keep_boundaries=False)


def softmax_storage(served: Any, pool_bytes: int) -> LayerStorage:
    """Pools that layers of different windows and shapes share, as vLLM plans them."""
    layers = [layer for layer in describe(served) if isinstance(layer, AttentionLayer)]
    largest = max(layer.token_bytes for layer in layers)
    kinds = sorted({(layer.window or 0, layer.token_bytes) for layer in layers})
    groups = {x.index: kinds.index((x.window or 0, x.token_bytes)) for x in layers}
    sizes = [BLOCK * (largest // token_bytes) for _, token_bytes in kinds]
    pools: list[PagePool] = []
    mine, seen = {}, dict.fromkeys(range(len(kinds)), 0)
    for layer in layers:
        place, seen[groups[layer.index]] = seen[groups[layer.index]], seen[groups[layer.index]] + 1
        if place == len(pools):
            page = largest * BLOCK
            pools.append(PagePool(pool_bytes // page, page, layer.dtype))
        mine[layer.index] = pools[place]
    mx.eval([pool.pages for pool in pools])
    return LayerStorage(layers, mine, groups, sizes, keep_boundaries=False)


def softmax_requests(storage: LayerStorage, lengths: list[int], room: int = 64) -> list[Request]:
    """Requests of these prompt lengths with blocks of every group."""
    draw = np.random.default_rng(0)
    need = [[-(-(length + room) // size) for size in storage.block_sizes] for length in lengths]
    free = list(draw.permutation(np.arange(1, 1 + sum(map(sum, need)))))
    params = SimpleNamespace(prompt_logprobs=None, temperature=0)
    made = []
    for row, length in enumerate(lengths):
        blocks = [[int(free.pop()) for _ in range(count)] for count in need[row]]
        prompt = [int(token) for token in draw.integers(0, TEXT["vocab_size"], length)]
        made.append(Request(f"r{row}", prompt, params, blocks, 0))
    return made


def requests(lengths: list[int], room: int = 64) -> list[Request]:
    """Requests of these prompt lengths with blocks for ``room`` more tokens, shuffled."""
    draw = np.random.default_rng(0)
    need = [-(-(length + room) // BLOCK) for length in lengths]
    free = list(draw.permutation(np.arange(1, 1 + sum(need) + len(need))))
    made = []
    for row, (length, count) in enumerate(zip(lengths, need, strict=True)):
        blocks = [[int(free.pop())], [int(free.pop()) for _ in range(count)]]
        prompt = [int(token) for token in draw.integers(0, TEXT["vocab_size"], length)]
        params = SimpleNamespace(prompt_logprobs=None, temperature=0)
        made.append(Request(f"r{row}", prompt, params, blocks, 0))
    return made


def prefill(forward: Any, rows: list[Request]) -> None:
    """All prompts but their last tokens."""
    forward(make_pass([(row, 0, len(row.prompt) - 1) for row in rows]), [])


def decode(forward: Any, rows: list[Request], *, greedy: bool = False) -> mx.array:
    """One token for everyone: append the likeliest, return the logits ``[B, V]``.

    ``greedy``: with the next pass built while this one runs.
    """
    work = make_pass([(row, row.num_tokens - 1, 1) for row in rows])
    logits, tokens = forward.decode(work, likeliest, build_next=greedy)
    forward.wait()
    for row, token in zip(rows, tokens.tolist(), strict=True):
        row.output.append(token)
    return logits


def likeliest(logits: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1).astype(mx.int32)
