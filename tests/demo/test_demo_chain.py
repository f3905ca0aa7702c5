"""The demo checkpoint through plain mlx-lm: its logits and its golden text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import vllm_moe_compat
from vllm_moe_compat import demo


@pytest.fixture(scope="module")
def loaded(demo_checkpoint: demo.DemoCheckpoint) -> tuple[Any, Any]:
    import mlx.core as mx
    import mlx_lm

    from vllm_moe_compat.load.options import loading_with

    with vllm_moe_compat.applied(), loading_with(dtype="float32"):
        model, tokenizer = mlx_lm.load(str(demo_checkpoint.path))
    model.set_dtype(mx.float32)
    return model, tokenizer


def test_logits_are_those_of_transformers(
    loaded: tuple[Any, Any], demo_checkpoint: demo.DemoCheckpoint
) -> None:
    import mlx.core as mx
    import torch

    model, tokenizer = loaded
    oracle = demo.load_reference(demo_checkpoint.path)
    for text in (demo_checkpoint.prompt, demo_checkpoint.text, "zq#x 7\n\nNow"):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            reference = oracle(torch.tensor([tokens])).logits[0].numpy()
        ours = np.array(model(mx.array([tokens]))[0])
        assert np.abs(ours - reference).max() / np.abs(reference).max() < 1e-5


def test_golden_text(loaded: tuple[Any, Any], demo_checkpoint: demo.DemoCheckpoint) -> None:
    import mlx_lm

    golden = json.loads((demo_checkpoint.path / "golden.json").read_text())
    text = mlx_lm.generate(*loaded, golden["prompt"], max_tokens=golden["max_tokens"])
    # mlx-lm's detokenizer drops a leading space.
    assert text == golden["text"].lstrip()


def test_without_any_setting_mlx_lm_generates_on_this_device(
    demo_checkpoint: demo.DemoCheckpoint,
) -> None:
    """Experts in a dtype that MLX's device multiplies; the rest stays bfloat16."""
    import mlx_lm

    with vllm_moe_compat.applied():
        model, tokenizer = mlx_lm.load(str(demo_checkpoint.path))
    text = mlx_lm.generate(model, tokenizer, demo_checkpoint.prompt, max_tokens=24)
    assert len(text) > 40
    assert demo_checkpoint.text.lstrip().startswith(text)
