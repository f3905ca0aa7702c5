"""mlx-lm's own adapters over a model that our hooks loaded, in floats and quantised (QLoRA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers

import vllm_moe_compat
from support.adapters import LAYERS, LORA, write_adapter
from support.checkpoints import Fp8, build
from support.loading import TOKENS, load, parameters


def logits(model: Any) -> mx.array:
    return model(mx.array([TOKENS]))


@pytest.mark.parametrize("setting", ["none", "8bit"])
def test_an_adapter_has_the_same_effect_as_over_the_floats(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Quantised, a dense model, in which a small difference cannot choose another expert.

    mlx-lm dequantises the reference, whose logits then differ by one per cent without an adapter.
    """
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    path = build(fp8=Fp8(), dense=setting != "none").write(tmp_path / "model")
    with vllm_moe_compat.applied():
        adapter = write_adapter(load(path), tmp_path / "adapter")
        monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", setting)
        reference = mlx_lm.utils.dequantize_model(load(path))
        model = load(path)
        plain = logits(model)
        adapted = mlx_lm.utils.load_adapters(model, str(adapter))
    found = logits(adapted)
    assert any(name.endswith("lora_a") for name in parameters(adapted))
    assert mx.abs(found - plain).max().item() > 0.1 * mx.abs(plain).max().item()
    linear_to_lora_layers(reference, LAYERS, LORA)
    reference.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    reference.eval()
    wanted = logits(reference)
    distance = mx.abs(found - wanted).max().item() / mx.abs(wanted).max().item()
    assert distance < (1e-5 if setting == "none" else 0.05)
