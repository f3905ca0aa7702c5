"""The estimate of activations against passes of the server's own kind, in bytes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from support import models
from support.engine import in_process_llm, worker
from vllm_moe_compat.backend.model import activations
from vllm_moe_compat.backend.pages import long_attention
from vllm_moe_compat.backend.step.batch import Request, make_pass
from vllm_moe_compat.backend.vllm import budget

pytestmark = pytest.mark.serve
TOKENS = 384


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3", "qwen3_5_moe"])
def test_no_pass_takes_more_than_was_estimated(
    kind: str, tmp_path: Path, demo_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for prompts on which the square of the tokens decides."""
    if kind == "qwen3_5_moe":
        path = demo_checkpoint.path
    else:
        path = models.write_mlx(tmp_path / "model", kind)
    with in_process_llm(path, max_model_len=1024, skip_tokenizer_init=True) as llm:
        mine = worker(llm)
        estimate = activations.measure(mine.served.model, mine.served.layers, TOKENS, 1024)
        forward = mine.runner.forward
        peaks = []
        # A prompt from its start, and a part of one that attends to pages.
        request = _request(mine, 2 * TOKENS)
        for start in (0, TOKENS):
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            forward(make_pass([(request, start, TOKENS)]), [])
            peaks.append(mx.get_peak_memory() - before)
        assert max(peaks) <= estimate <= 8 * max(peaks)
        whole = forward(make_pass([(request, TOKENS, TOKENS)]), [0])

        # Scores as a whole would not fit.
        monkeypatch.setattr(long_attention, "SCORE_LIMIT", 1 << 18)
        bounded = activations.measure(mine.served.model, mine.served.layers, TOKENS, 1024)
        assert bounded < estimate
        parts = forward(make_pass([(request, TOKENS, TOKENS)]), [0])
        assert mx.abs(parts - whole).max().item() <= 1e-5 * mx.abs(whole).max().item()
        assert budget.measure(mine.vllm_config, mine.served).activations


def _request(mine, count: int) -> Request:
    from types import SimpleNamespace

    blocks, at = [], 1
    for size in mine.runner.storage.block_sizes:
        need = -(-count // size)
        blocks.append(list(range(at, at + need)))
        at += need
    return Request("one", [1 + i % 30 for i in range(count)], SimpleNamespace(), blocks, 0)
