"""The life cycle of the worker."""

from __future__ import annotations

import gc
import sys
import traceback
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest
from mlx_lm.models import base

from support import compiled
from support.engine import in_process_llm, worker
from vllm_moe_compat import demo
from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.step import compiled_decode
from vllm_moe_compat.load import claims

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
    # pytest keeps logged tracebacks, and they this engine: other files count its memory.
    traceback.clear_frames(failure.value.__traceback__)


@compiled.same_bits
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


def test_the_end_of_an_engine_gives_its_memory_back(
    demo_checkpoint: demo.DemoCheckpoint,
) -> None:
    """And a second engine beside it counts what the first one has not touched yet."""
    gc.collect()
    active, claimed = mx.get_active_memory(), claims.own()
    settings = {"kv_cache_memory_bytes": 96 << 20}
    with in_process_llm(demo_checkpoint.path, **settings) as first:
        with in_process_llm(demo_checkpoint.path, **settings) as second:
            assert mx.get_active_memory() - active > 192 << 20
            assert claims.own() - claimed > 160 << 20
            size = psutil.Process().memory_info().rss
        assert psutil.Process().memory_info().rss < size
        assert 80 << 20 < claims.own() - claimed <= 96 << 20
        del second
        assert first.generate("Beautiful", use_tqdm=False)[0].outputs[0].text
    assert claims.own() == claimed
    assert mx.get_active_memory() - active < 1 << 20
    assert hooked() == []
