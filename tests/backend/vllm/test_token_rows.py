"""The rows that a checkpoint's headers and a loaded model have for token ids."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_moe_compat.backend.model import token_rows as loaded
from vllm_moe_compat.backend.model.rows import TokenRows
from vllm_moe_compat.backend.vllm import token_rows
from vllm_moe_compat.backend.vllm.request_checks import first_fault


def checkpoint(path: Path, model_type: str, tensors: dict[str, tuple[int, ...]]) -> Any:
    """Write headers; return what a ``ModelConfig`` says of them, with 64 tokens."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 64}))
    arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in tensors.items()}
    save_file(arrays, path / "model.safetensors")
    return SimpleNamespace(model=str(path), revision=None, get_vocab_size=lambda: 64)


@pytest.mark.parametrize(
    ("model_type", "tensors", "expected"),
    [
        ("qwen3_moe", {"model.embed_tokens.weight": (48, 8)}, TokenRows(48, 48)),
        (
            "qwen3_moe",
            {"model.embed_tokens.weight": (48, 8), "lm_head.weight": (72, 8)},
            TokenRows(48, 72),
        ),
        ("qwen3_5_moe", {"model.language_model.embed_tokens.weight": (48, 8)}, TokenRows(48, 48)),
        ("nemotron_h", {"backbone.embeddings.weight": (48, 8)}, TokenRows(48, 48)),
        # Tokens stand on the last axis here, and a layer's tensor is no embedding of tokens.
        ("qwen3_moe", {"lm_head.qweight": (8, 48)}, TokenRows(64, 64)),
        ("qwen3_moe", {"model.layers.0.embed_tokens.weight": (9, 8)}, TokenRows(64, 64)),
    ],
)
def test_headers_tell(
    tmp_path: Path, model_type: str, tensors: dict[str, tuple[int, ...]], expected: TokenRows
) -> None:
    config = checkpoint(tmp_path / "checkpoint", model_type, tensors)
    assert token_rows.of_checkpoint(config) == expected


def test_without_readable_headers_the_config_counts(tmp_path: Path) -> None:
    config = checkpoint(tmp_path / "broken", "qwen3_moe", {})
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no header")
    assert token_rows.of_checkpoint(config) == TokenRows(64, 64)
    config.model = "nobody/has-this-repository"
    assert token_rows.of_checkpoint(config) == TokenRows(64, 64)


def test_a_loaded_models_embeddings_of_positions_do_not_count() -> None:
    from mlx_lm.models import gpt2

    args = gpt2.ModelArgs(
        model_type="gpt2",
        n_ctx=16,
        n_embd=8,
        n_head=2,
        n_layer=1,
        n_positions=16,
        layer_norm_epsilon=1e-5,
        vocab_size=64,
    )
    model = gpt2.Model(args)
    before = nn.Embedding.__call__
    assert loaded.of_model(model) == TokenRows(64, 64)
    assert nn.Embedding.__call__ is before


def test_numbers_at_the_edge_of_what_fits() -> None:
    from vllm import SamplingParams

    rows = TokenRows(64, 64)
    sound: list[dict[str, Any]] = [
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"logit_bias": {63: 3.4e38}},
        {"logprobs": 64},
        {"prompt_logprobs": -1},
        {"max_tokens": 2**63 - 1},
    ]
    for params in sound:
        assert first_fault([0, 63], SamplingParams(**params), rows) is None
    wrong: list[dict[str, Any]] = [
        {"seed": 2**64},
        {"logit_bias": {63: 3.5e38}},
        {"logit_bias": {64: 1.0}},
        {"logprobs": 65},
        {"prompt_logprobs": 65},
        {"max_tokens": 2**63},
        {"allowed_token_ids": [64]},
        {"stop_token_ids": [-1]},
    ]
    for params in wrong:
        (name,) = params
        assert name in str(first_fault([0, 63], SamplingParams(**params), rows))
    assert first_fault([64], SamplingParams(), TokenRows(65, 64)) is None
