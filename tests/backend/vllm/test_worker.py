"""The life cycle of the worker."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models import base

from support.engine import in_process_llm, worker
from vllm_moe_compat import demo
from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.step import compiled_decode

pytestmark = pytest.mark.serve


def hooked() -> list[str]:
    """Modules whose attention function is ours, by looking at all of them."""
    return [
        name
        for name, module in sys.modules.items()
        if name.startswith("mlx_lm.models.")
        and vars(module).get(attention_hook.NAME) is attention_hook.attention
    ]


def test_shutdown_removes_the_attention_hook(demo_checkpoint: demo.DemoCheckpoint) -> None:
    gc.collect()
    assert hooked() == []
    path: Path = demo_checkpoint.path
    with in_process_llm(path) as llm:
        mine: Any = worker(llm)
        assert hooked()
        functions = [vars(sys.modules[name]) for name in hooked()]
        # Kept alive, so that nothing but the shutdown can remove the hook.
        runner = mine.runner
        mine.shutdown()
        assert hooked() == []
        assert all(f[attention_hook.NAME] is base.scaled_dot_product_attention for f in functions)
        assert runner.forward is not None
        mine.shutdown()


def test_a_failed_self_check_removes_the_attention_hook(
    demo_checkpoint: demo.DemoCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PagePool, "write_rows", lambda self, rows, values: None)
    with (
        pytest.raises(Exception, match="paged logits differ") as failure,
        in_process_llm(demo_checkpoint.path),
    ):
        pass
    # The traceback keeps the worker, and with it the runner, alive.
    assert failure.value is not None
    assert hooked() == []


def test_decode_passes_are_compiled_unless_vllm_enforces_eager_mode(
    demo_checkpoint: demo.DemoCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    monkeypatch.setattr(compiled_decode, "PASSES_BEFORE_COMPILING", 2)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (30, 12, 20)]
    prompts = [{"prompt_token_ids": list(range(9, 9 + n))} for n in (40, 7, 300)]
    tokens = []
    for eager in (False, True):
        with in_process_llm(demo_checkpoint.path, enforce_eager=eager) as llm:
            answers = llm.generate(prompts, params, use_tqdm=False)
            compiled = worker(llm).runner.forward.compiled
            assert compiled.failure == ("switched off" if eager else "")
            assert (compiled.passes > 12) is not eager
            tokens.append([answer.outputs[0].token_ids for answer in answers])
    assert tokens[0] == tokens[1]
