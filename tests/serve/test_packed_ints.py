"""Packed integers through vLLM's engine: the tokens are mlx-lm's, the words stay packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from serve.test_module_paths import SETTINGS, compare, generate
from support.engine import in_process_llm, worker

pytestmark = [
    pytest.mark.serve,
    pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch"),
]


def packed(llm: Any) -> None:
    import mlx.core as mx

    layer = worker(llm).served.model.layers[1]
    assert layer.self_attn.o_proj.weight.dtype == mx.uint32
    assert layer.mlp.switch_mlp.gate_proj.weight.dtype == mx.uint32


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3_moe", "int4"),
        ("qwen3_moe", "GPTQ"),
        ("qwen3_moe", "AWQ"),
        ("qwen3_moe", "AutoRound"),
        ("deepseek_v3", "int8 W8A8"),
    ],
)
def test_the_tokens_are_mlx_lms(family: str, form: str, tmp_path: Path):
    folder = build(FAMILIES[family], FORM_BY_NAME[form]).write(tmp_path)
    compare(folder, packed, vocabulary=96)


def test_scales_stay_exact_in_half_precision(tmp_path: Path):
    """bfloat16 serves float16 scales and zero points; activations and pages are bfloat16."""
    import mlx.core as mx

    folder = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["AWQ"]).write(tmp_path)
    with in_process_llm(folder, dtype="bfloat16", **SETTINGS) as llm:
        model = worker(llm).served.model
        for module in (model.layers[1].self_attn.o_proj, model.layers[1].mlp.switch_mlp.up_proj):
            assert module.scales.dtype == module.biases.dtype == mx.float32
        assert model.model.norm.weight.dtype == mx.bfloat16
        hidden = model.model(mx.array([[1, 2, 3]]))
        assert hidden.dtype == mx.bfloat16
        assert len(generate(llm, [[5, 6, 7]])[0]) > 1
