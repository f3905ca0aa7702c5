"""The check before the first request finds pages that lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import models
from support.engine import in_process_llm, worker
from vllm_moe_compat import demo
from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.state_pool import StatePool
from vllm_moe_compat.backend.step import self_check
from vllm_moe_compat.errors import UnsupportedServingError

pytestmark = pytest.mark.serve


def test_it_passes_on_what_works_and_refuses_what_does_not(
    demo_checkpoint: demo.DemoCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = demo_checkpoint.path
    with in_process_llm(path) as llm:
        runner = worker(llm).runner
        self_check.run(runner.forward)
        assert not runner.storage.states.resident
        assert not any(pool.pages.any().item() for pool in runner.storage.distinct_pools)

        # Keys and values that never arrive.
        with monkeypatch.context() as broken:
            broken.setattr(PagePool, "write_rows", lambda self, rows, values: None)
            with pytest.raises(UnsupportedServingError, match="paged logits differ"):
                self_check.run(runner.forward)
        runner.storage.states.banks.clear()

        # States that start from zero in every step.
        with monkeypatch.context() as broken:
            broken.setattr(StatePool, "put_in", lambda self, req_ids, states: None)
            with pytest.raises(UnsupportedServingError, match="paged logits differ"):
                self_check.run(runner.forward)


def test_it_looks_beyond_a_small_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.write_mlx(tmp_path / "model", "gpt_oss")
    with in_process_llm(path, max_model_len=256, skip_tokenizer_init=True) as llm:
        runner = worker(llm).runner
        self_check.run(runner.forward)
        assert not any(pool.pages.any().item() for pool in runner.storage.distinct_pools)
        with monkeypatch.context() as broken:
            broken.setattr(AttentionMetadata, "with_window", lambda self, window: self)
            with pytest.raises(UnsupportedServingError, match="paged logits differ"):
                self_check.run(runner.forward)
