"""FP8 and FP4 of every convention, and configs of transformers 5, through vLLM's engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from serve.test_module_paths import compare

pytestmark = [
    pytest.mark.serve,
    pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch"),
]


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3_moe", "saved"),
        ("qwen3_moe", "per-tensor FP8"),
        ("qwen3_moe", "per-channel FP8"),
        ("qwen3_moe", "ModelOpt FP8"),
        ("qwen3_moe", "block FP8 E8M0"),
        ("mixtral", "block FP8"),
        ("qwen3_5_moe_text", "saved"),
        ("ministral3", "per-tensor FP8"),
        ("qwen3_moe", "NVFP4"),
        ("qwen3_moe", "ModelOpt FP8 and NVFP4"),
        ("qwen3_moe", "FP4 of DeepSeek"),
        ("llama", "ModelOpt NVFP4"),
    ],
)
def test_the_tokens_are_mlx_lms(family: str, form: str, tmp_path: Path):
    folder = build(FAMILIES[family], FORM_BY_NAME[form]).write(tmp_path)
    compare(folder, vocabulary=96)
