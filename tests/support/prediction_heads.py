"""Random prediction heads straight from mlx-lm's classes."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from support import hybrid
from support.models import build_mlx
from vllm_moe_compat.backend.model import backbone
from vllm_moe_compat.backend.model.prediction_heads import PredictionHeads
from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.layers import AttentionLayer, nest_caches
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.paged_kv import PagedKV
from vllm_moe_compat.load.prediction_heads import HeadParts

BLOCK = 16


def gated_delta(**rules: Any) -> tuple[Any, PredictionHeads]:
    """A hybrid target, and a head of one softmax layer."""
    from mlx_lm.models.qwen3_5 import Model, ModelArgs

    text = hybrid.TEXT | {"num_hidden_layers": 1, "full_attention_interval": 1}
    target = hybrid.model()
    mx.random.seed(1)
    text["rope_parameters"] = dict(hybrid.TEXT["rope_parameters"])
    one = Model(ModelArgs.from_dict({"model_type": "qwen3_5_moe", "text_config": text}))
    backbone.of_model(one).ssm_idx = None
    return _heads(target, one, **rules)


def latent(**rules: Any) -> tuple[Any, PredictionHeads]:
    """A target with latent attention, and a head of one such layer with experts."""
    from mlx_lm.models.deepseek_v3 import Model, ModelArgs

    target, config = build_mlx("deepseek_v3")
    mx.random.seed(1)
    config = config | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    one = Model(ModelArgs.from_dict(config))
    return _heads(target, one, **({"masks_first": True} | rules))


def windowed(**rules: Any) -> tuple[Any, PredictionHeads]:
    """A target with windows, and a head of one layer with a window."""
    from mlx_lm.models.exaone_moe import Model, ModelArgs

    target, config = build_mlx("exaone_moe")
    mx.random.seed(1)
    one = {
        "num_hidden_layers": 1,
        "layer_types": ["sliding_attention"],
        "is_moe_layer": [False],
        "sliding_window": 16,
    }
    return _heads(target, Model(ModelArgs.from_dict(config | one)), **rules)


def _heads(target: Any, one: Any, **rules: Any) -> tuple[Any, PredictionHeads]:
    decoder = copy.copy(backbone.of_model(one))
    norm, decoder["norm"], decoder["embed_tokens"] = decoder["norm"], nn.Identity(), nn.Identity()
    (size,) = norm.weight.shape
    join, mine, theirs = nn.Linear(2 * size, size, bias=False), nn.RMSNorm(size), nn.RMSNorm(size)
    for module in (norm, mine, theirs):
        module.weight = 1 + mx.random.uniform(-0.5, 0.5, (size,))
    decoder.update(tree_map(lambda x: x * 3 if x.ndim > 1 else x, decoder.parameters()))
    heads = PredictionHeads(target, HeadParts(one, decoder, join, mine, theirs, norm, **rules))
    mx.eval(heads.parameters())
    return target, heads


class Pages:
    """Pages of a head's caches for some rows, each with blocks of its own."""

    def __init__(self, layers: list[AttentionLayer], rows: int, longest: int) -> None:
        each = -(-longest // BLOCK)
        draw = np.random.default_rng(0)
        self.layers = layers
        self.tables = 1 + draw.permutation(rows * each).reshape(rows, each).astype(np.int64)
        self.pools = [
            PagePool(1 + rows * each, layer.token_bytes * BLOCK, layer.dtype) for layer in layers
        ]

    def caches(self, offsets: list[int], lengths: list[int]) -> list[Any]:
        """Caches of one pass, which appends ``lengths`` tokens to ``offsets``."""
        starts, counts = np.asarray(offsets), np.asarray(lengths)
        full = AttentionMetadata(starts, counts, self.tables, BLOCK)
        return nest_caches(
            self.layers,
            [
                PagedKV(
                    layer,
                    pool,
                    full if layer.window is None else full.with_window(layer.window),
                    attends_itself=layer.attends_itself,
                )
                for layer, pool in zip(self.layers, self.pools, strict=True)
            ],
        )

    def evaluate(self, *outputs: mx.array) -> None:
        """Evaluate a pass."""
        mx.eval([pool.pages for pool in self.pools], *outputs)
