"""Layers are described from the model; a cache that pages cannot hold is refused by name."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from support import models
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.pages.layers import (
    AttentionLayer,
    Batching,
    StateLayer,
    batching_of,
    nest_caches,
)
from vllm_moe_compat.errors import UnsupportedServingError


def hybrid(**changes: Any) -> Any:
    from mlx_lm.models.qwen3_next import Model, ModelArgs

    settings: dict[str, Any] = {
        "model_type": "qwen3_next",
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "rms_norm_eps": 1e-6,
        "vocab_size": 64,
        "num_key_value_heads": 2,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 512,
        "head_dim": 24,
        "full_attention_interval": 3,
    }
    return Model(ModelArgs.from_dict(settings | changes))


def test_a_hybrids_layers_are_described_with_their_shapes():
    layers = describe(hybrid())
    assert [type(layer) for layer in layers] == [
        StateLayer,
        StateLayer,
        AttentionLayer,
        StateLayer,
        StateLayer,
    ]
    softmax, linear = layers[2], layers[0]
    assert isinstance(softmax, AttentionLayer)
    assert (softmax.kv_heads, softmax.head_dim, softmax.dtype) == (2, 24, mx.float32)
    assert isinstance(linear, StateLayer)
    assert linear.shapes == ((3, 2 * 2 * 32 + 4 * 16), (4, 16, 32))
    assert linear.dtypes == (mx.float32, mx.float32)
    assert softmax.attends_itself
    assert softmax.window is None
    assert batching_of(layers) is Batching.PADDED


def test_describing_evaluates_nothing():
    model = hybrid()
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    describe(model)
    assert mx.get_peak_memory() - before < 4096


def deepseek(name: str, **changes: Any) -> Any:
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{name}")
    settings: dict[str, Any] = {
        "model_type": name,
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": None,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "qk_nope_head_dim": 32,
    }
    return module.Model(module.ModelArgs.from_dict(settings | changes))


def test_a_latent_and_its_rotary_part_lie_beside_each_other():
    (layer,) = describe(deepseek("deepseek_v3"))
    assert isinstance(layer, AttentionLayer)
    assert (layer.kv_heads, layer.head_dim, layer.value_dim) == (1, 32, 16)
    assert (layer.planes, layer.row, layer.token_bytes) == (1, 48, 48 * 4)
    assert not layer.attends_itself, "keys are computed from what the cache returns"


def gpt_oss() -> Any:
    from mlx_lm.models.gpt_oss import Model, ModelArgs

    return Model(
        ModelArgs(
            num_hidden_layers=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            vocab_size=64,
            hidden_size=64,
            intermediate_size=32,
            head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
            rope_scaling={"rope_type": "default"},
        )
    )


def test_windows_come_from_the_caches():
    sliding, full = describe(gpt_oss())
    assert isinstance(sliding, AttentionLayer)
    assert isinstance(full, AttentionLayer)
    assert (sliding.window, full.window) == (8, None)
    assert sliding.attends_itself


def test_shared_keys_are_read_and_not_attended_to_by_the_cache():
    from mlx_lm.models.gemma4_text import Model, ModelArgs

    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    shared = describe(Model(ModelArgs.from_dict(settings | {"num_kv_shared_layers": 2})))
    assert [(layer.head_dim, layer.window, layer.attends_itself) for layer in shared] == [
        (16, 8, False),
        (32, None, False),
    ]
    own = describe(Model(ModelArgs.from_dict(settings | {"num_kv_shared_layers": 0})))
    assert [layer.attends_itself for layer in own] == [True] * 4


def test_a_model_without_keys_and_values_is_refused():
    from mlx_lm.models.mamba import Model, ModelArgs

    model = Model(
        ModelArgs(
            model_type="mamba",
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            state_size=8,
            num_hidden_layers=1,
            conv_kernel=4,
            use_bias=False,
            use_conv_bias=True,
            time_step_rank=4,
        )
    )
    with pytest.raises(UnsupportedServingError, match=r"mlx_lm.models.mamba: none of its layers"):
        describe(model)


class Kept:
    """A model of one layer that keeps whatever it is told to."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.layers = [self]

    def make_cache(self) -> list[Any]:
        return [self.cache]


def test_other_caches_are_refused_by_name():
    from mlx_lm.models.cache import CacheList, ConcatenateKVCache, KVCache, RotatingKVCache

    for cache, words in (
        (
            CacheList(KVCache(), ConcatenateKVCache()),
            "it uses a ConcatenateKVCache, and pages can only",
        ),
        (ConcatenateKVCache(), "it uses a ConcatenateKVCache, and pages can only"),
        (RotatingKVCache(8, keep=4), "its window always keeps the first 4 tokens"),
    ):
        with pytest.raises(UnsupportedServingError, match=rf"layer 0 \(.*\): {words}"):
            describe(Kept(cache))


def test_a_layer_with_two_caches_gets_them_back_together():
    model, _ = models.build_mlx("falcon_h1")
    layers = describe(model)
    assert [(type(x), x.index, x.slot) for x in layers[:3]] == [
        (StateLayer, 0, 0),
        (AttentionLayer, 1, 0),
        (StateLayer, 2, 1),
    ]
    given = nest_caches(layers, range(len(layers)))
    assert [list(cache.caches) for cache in given] == [[0, 1], [2, 3], [4, 5], [6, 7]]
