"""The start-up line about a loaded model."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2, llama

from support import models
from vllm_moe_compat.backend.model import loader
from vllm_moe_compat.backend.pages.layers import Batching, batching_of

GEMMA2 = {
    "model_type": "gemma2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
    "query_pre_attn_scalar": 16,
    # No token is outside a window; a window that is put in brings masks of five axes along.
    "sliding_window": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _log_lines_reach_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an earlier test made vLLM's logger the parent."""
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "parent", logging.getLogger())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = gemma2.Model(gemma2.ModelArgs.from_dict(dict(GEMMA2)))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(GEMMA2))
    return tmp_path


def start_up_line(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level("INFO", "vllm_moe_compat"):
        served = loader.load(str(checkpoint), None, mx.float32)
    assert batching_of(served.layers) is Batching.SINGLE_SEQUENCE
    (line,) = {r.getMessage() for r in caplog.records if "platform serves" in r.getMessage()}
    return line


def test_it_says_why_a_model_is_served_one_sequence_at_a_time(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 2 applies masks to scores of five axes, so a mask per sequence does not fit."""
    line = start_up_line(checkpoint, caplog)
    assert "one sequence at a time, since its code fails on several (ValueError: " in line
    # MLX's message: the operation and the shapes.
    assert "Shapes (7," in line


def test_the_reason_is_the_failure_itself(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = gemma2.Attention.__call__

    def one_row(self: object, x: mx.array, mask: object, cache: object) -> mx.array:
        if len(x) > 1:
            raise IndexError("row 1 of 1")
        result: mx.array = attend(self, x, mask, cache)
        return result

    monkeypatch.setattr(gemma2.Attention, "__call__", one_row)
    line = start_up_line(checkpoint, caplog)
    assert line.endswith("since its code fails on several (IndexError: row 1 of 1)")


def test_rotary_frequencies_keep_their_precision(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
    config = GEMMA2 | {
        "model_type": "llama",
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "rope_scaling": rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    served = loader.load(str(tmp_path), None, mx.bfloat16).model
    attention = served.model.layers[0].self_attn
    assert attention.q_proj.weight.dtype == mx.bfloat16
    assert attention.rope._freqs.dtype == mx.float32
    assert mx.array_equal(attention.rope._freqs, model.model.layers[0].self_attn.rope._freqs)


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4"])
def test_nothing_but_the_model_holds_its_weights(kind: str, tmp_path: Path) -> None:
    """The passes that are built to describe layers would hold the stored weights, too."""
    path = models.write_mlx(tmp_path / "model", kind)
    gc.collect()
    before = mx.get_active_memory()
    gc.disable()
    try:
        served = loader.load(str(path), None, mx.float16)
        mx.clear_cache()
        assert mx.get_active_memory() - before < served.weight_bytes * 1.1
        del served
        assert mx.get_active_memory() - before < 1 << 12
    finally:
        gc.enable()
