"""Layer kinds come from the model; what has no paged storage is refused by name."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from vllm_moe_compat.backend.layers import AttentionLayer, LinearLayer, describe
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
        LinearLayer,
        LinearLayer,
        AttentionLayer,
        LinearLayer,
        LinearLayer,
    ]
    softmax, linear = layers[2], layers[0]
    assert isinstance(softmax, AttentionLayer)
    assert (softmax.kv_heads, softmax.head_dim, softmax.dtype) == (2, 24, mx.float32)
    assert isinstance(linear, LinearLayer)
    assert linear.conv_shape == (3, 2 * 2 * 32 + 4 * 16)
    assert linear.state_shape == (4, 16, 32)
    assert linear.state_dtype == mx.float32


def test_describing_evaluates_nothing():
    model = hybrid()
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    describe(model)
    assert mx.get_peak_memory() - before < 4096


def test_latent_attention_is_refused():
    from mlx_lm.models.deepseek_v3 import Model, ModelArgs

    model = Model(
        ModelArgs.from_dict(
            {
                "model_type": "deepseek_v3",
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
        )
    )
    with pytest.raises(UnsupportedServingError, match=r"layer 0 .*latent attention"):
        describe(model)


def test_another_recurrence_is_refused():
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
    with pytest.raises(
        UnsupportedServingError, match=r"layer 0 \(mlx_lm.models.mamba.*ArraysCache"
    ):
        describe(model)
