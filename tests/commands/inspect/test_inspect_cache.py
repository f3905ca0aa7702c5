"""The bytes that a sequence keeps, by the config, are those that mlx-lm's caches hold."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.commands.inspect.cache import cache
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.families.row import Cache

# One family for every way in which a config tells.
CHOSEN = (
    *("mixtral", "qwen3_5_moe", "gpt_oss", "llama4", "gemma4", "granitemoehybrid"),
    *("jamba", "lfm2_moe", "nemotron_h", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    *("longcat_flash", "kimi_linear", "mimo_v2_flash", "gemma2", "falcon_h1", "minicpm3"),
    *("gemma3", "mistral", "qwen2", "qwen3_moe", "phi3", "cohere2", "exaone_moe", "laguna"),
)


@pytest.mark.parametrize("name", CHOSEN)
def test_it_is_what_the_model_keeps(name: str, tmp_path: Path):
    path = build(FAMILIES[name], FORM_BY_NAME["release"]).write(tmp_path)
    memory = inspect(str(path)).memory
    assert memory is not None
    assert memory.cache, memory.cache_note
    with vllm_moe_compat.applied():
        loaded, _ = mlx_lm.utils.load_model(path)
    loaded.set_dtype(mx.bfloat16)
    growing = states = 0
    windows = {}
    for layer in describe(loaded):
        if not isinstance(layer, AttentionLayer):
            states += sum(
                math.prod(shape) * dtype.size
                for shape, dtype in zip(layer.shapes, layer.dtypes, strict=True)
            )
        elif layer.window is None:
            growing += 1000 * layer.token_bytes
        else:
            tokens = min(1000, layer.window)
            windows[layer.window] = windows.get(layer.window, 0) + tokens * layer.token_bytes
    assert growing == sum(k.bytes_per_1000_tokens or 0 for k in memory.cache if not k.window)
    assert windows == {k.window: k.bytes_per_1000_tokens for k in memory.cache if k.window}
    assert states == sum(k.state_bytes or 0 for k in memory.cache)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "num_hidden_layers"),
        ({"num_hidden_layers": 2}, "num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "no number of use"),
        ({"num_hidden_layers": True}, "no number of use"),
        ({"num_hidden_layers": 2, "num_attention_heads": "4"}, "no number of use"),
        ({"num_hidden_layers": 2, "num_kv_shared_layers": 1}, "share"),
    ],
)
def test_what_the_config_does_not_tell_is_not_known(config: dict[str, object], why: str):
    kinds, note = cache(config, Cache())
    assert kinds == []
    assert note.startswith("not known: ")
    assert why in note


def test_a_kind_of_layer_that_nobody_knows():
    config = {"layer_types": ["full_attention", "odd\x1b"], "num_hidden_layers": 2}
    kinds, _ = cache({**config, "num_attention_heads": 2, "head_dim": 8}, Cache())
    assert [(kind.kind, kind.bytes_per_1000_tokens) for kind in kinds] == [
        ("softmax", 64_000),
        ("odd?", None),
    ]
