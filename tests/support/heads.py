"""Prediction heads with random weights for the small hybrid model, pages for them, and a reference.

The heads are Qwen3.5's: two norms, a projection, one softmax layer with experts, a final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.models.qwen3_5 import DecoderLayer

from support import hybrid
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Request

HIDDEN = int(hybrid.TEXT["hidden_size"])
VOCABULARY = int(hybrid.TEXT["vocab_size"])


class RandomHeads(nn.Module):
    """``PredictionHeads`` of ``target`` with random weights."""

    def __init__(self, target: Any, seed: int = 1) -> None:
        super().__init__()
        mx.random.seed(seed)
        args = target.language_model.args
        self.norms = [nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)]
        self.projection = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.decoder = DecoderLayer(args, args.full_attention_interval - 1)
        self.update(tree_map(lambda x: x * 3 if x.ndim > 1 else x, self.parameters()))
        mx.eval(self.parameters())
        # A function, since a module would count as a part of the heads.
        self.target = lambda: target.language_model

    def decode(
        self, tokens: mx.array, hidden: mx.array, cache: Sequence[Any]
    ) -> tuple[mx.array, mx.array]:
        embedded = self.norms[0](self.embed(tokens))
        both = mx.concatenate([embedded, self.norms[1](hidden)], axis=-1)
        joined = self.projection(both)
        out = self.norms[2](self.decoder(joined, create_attention_mask(joined, cache[0]), cache[0]))
        return out, out

    def logits(self, normed: mx.array) -> mx.array:
        logits: mx.array = self.target().lm_head(normed)
        return logits

    def embed(self, tokens: mx.array) -> mx.array:
        embedded: mx.array = self.target().model.embed_tokens(tokens)
        return embedded

    def make_cache(self) -> list[Any]:
        return [KVCache()]

    @property
    def description(self) -> AttentionLayer:
        return AttentionLayer(
            0,
            int(hybrid.TEXT["num_key_value_heads"]),
            int(hybrid.TEXT["head_dim"]),
            mx.float32,
            slot=0,
        )


def storage(heads: RandomHeads, pool_bytes: int, pool: PagePool | None = None) -> LayerStorage:
    """Pages of the heads in the group of the softmax layers of ``hybrid.storage``."""
    layer = heads.description
    page = layer.token_bytes * hybrid.BLOCK
    if pool is None:
        pool = PagePool(pool_bytes // page, page, layer.dtype)
        mx.eval(pool.pages)
    return LayerStorage([layer], {0: pool}, {0: 1}, [4096, hybrid.BLOCK], keep_boundaries=False)


def hidden_states(request: Request, count: int) -> mx.array:
    """Hidden states ``[count, H]`` that stand for the target's, the same for equal ids."""
    draw = np.random.default_rng(list(request.req_id.encode()))
    return mx.array(draw.normal(size=(count, HIDDEN)).astype(np.float32))


def reference(heads: RandomHeads, request: Request, count: int) -> list[int]:
    """``count`` drafts after the request's last token: the whole sequence at once, no pages."""
    known = request.num_tokens - 1
    cache = [KVCache()]
    tokens = mx.array([request.tokens(1, known)])
    normed, hidden = heads.decode(tokens, hidden_states(request, known)[None], cache)
    drafts = []
    while True:
        token = mx.argmax(heads.logits(normed)[:, -1], axis=-1)
        drafts.append(int(token.item()))
        if len(drafts) == count:
            return drafts
        normed, hidden = heads.decode(token[:, None], hidden[:, -1:], cache)
