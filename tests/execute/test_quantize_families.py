"""Requantising while loading gives the bits of dequantising first, for every kind of family."""

from __future__ import annotations

from pathlib import Path

import mlx_lm.utils
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from support.loading import load, parameters, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

CELLS = [
    ("mixtral", "block FP8"),
    ("qwen3_moe", "per-channel FP8"),
    ("qwen3_moe", "combined"),
    ("qwen3_next", "block FP8"),
    ("gpt_oss", "saved"),
    ("llama4", "block FP8 combined"),
    ("nemotron_h", "ModelOpt FP8"),
    ("gemma4", "block FP8"),
    ("jamba", "block FP8"),
    ("deepseek_v3", "block FP8"),
    ("deepseek_v3", "per-tensor FP8"),
    ("glm4_moe", "block FP8 E8M0"),
    ("kimi_vl", "block FP8"),
    ("qwen3", "per-channel FP8"),
    ("ministral3", "per-tensor FP8"),
    ("falcon_h1", "block FP8"),
]


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


@pytest.mark.parametrize(("family", "form"), CELLS)
def test_the_bits_are_those_of_dequantising_first(
    family: str, form: str, tmp_path: Path, monkeypatch
):
    folder = build(FAMILIES[family], FORM_BY_NAME[form]).write(tmp_path)
    model, config = mlx_lm.utils.load_model(folder)
    wanted, _ = mlx_lm.utils.quantize_model(model, config, 64, 8)
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "8bit")
    found = parameters(load(folder))
    assert any(name.endswith(".scales") for name in found)
    assert same_bits(found, parameters(wanted))
