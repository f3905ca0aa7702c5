"""The demo checkpoint's golden text is the same with its weights in eight bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import vllm_moe_compat
from support.engine import in_process_llm
from vllm_moe_compat import demo
from vllm_moe_compat.load.report import last_report


@pytest.fixture(autouse=True)
def _setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "8bit")
    with vllm_moe_compat.applied():
        yield


def test_through_mlx_lm(demo_checkpoint: demo.DemoCheckpoint) -> None:
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(demo_checkpoint.path))
    text = mlx_lm.generate(
        model, tokenizer, demo_checkpoint.prompt, max_tokens=demo_checkpoint.max_tokens
    )
    assert text == demo_checkpoint.text.lstrip()


@pytest.mark.serve
def test_through_vllm(demo_checkpoint: demo.DemoCheckpoint) -> None:
    from vllm import SamplingParams

    with in_process_llm(demo_checkpoint.path) as llm:
        params = SamplingParams(temperature=0, max_tokens=demo_checkpoint.max_tokens)
        (answer,) = llm.generate([demo_checkpoint.prompt], params, use_tqdm=False)
    assert answer.outputs[0].text == demo_checkpoint.text
    report = last_report()
    assert report is not None
    assert report.setting == "8bit"
    assert report.quantized > 40
