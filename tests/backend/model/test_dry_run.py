"""The limits of a model's code are found before anything is computed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.model.dry_run import dry_run
from vllm_moe_compat.backend.pages.layers import Batching, batching_of
from vllm_moe_compat.errors import UnsupportedServingError


def gemma2(kv_heads: int) -> Any:
    from mlx_lm.models.gemma2 import Model, ModelArgs

    settings = {
        "model_type": "gemma2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 64,
        "query_pre_attn_scalar": 16,
    }
    return Model(ModelArgs.from_dict(settings))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_masks_that_fit_only_one_sequence_limit_a_pass_to_one(kv_heads: int) -> None:
    """Its scores are [B, H, G, T, L]: a mask per row would be taken for one per head."""
    model = gemma2(kv_heads)
    layers = describe(model)
    assert batching_of(layers) is Batching.PADDED
    result = dry_run(model, layers)
    assert batching_of(result.layers) is Batching.SINGLE_SEQUENCE
    assert result.failure.startswith("ValueError: [broadcast_shapes]")


def test_code_that_wants_more_of_a_cache_is_refused() -> None:
    model = gemma2(2)
    layers = describe(model)
    asked = type(model).__call__

    class Nosy(type(model)):  # type: ignore[misc]
        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            cache[0].keys.any()
            result: mx.array = asked(self, tokens, cache)
            return result

    model.__class__ = Nosy
    with pytest.raises(UnsupportedServingError, match=r"does not run on paged caches \(Attribute"):
        dry_run(model, layers)
