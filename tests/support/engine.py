"""vLLM's engine in this process, driven step by step, and mlx-lm as the reference."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


@contextmanager
def in_process_llm(path: Path, **settings: Any) -> Iterator[Any]:
    """``vllm.LLM`` with the engine core in this process, shut down at the end."""
    # Read by vLLM when the engine is made.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    defaults: dict[str, Any] = {
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 32 << 20,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "seed": 0,
    }
    # vLLM collects garbage at the start and at the end of an engine. Both visit a million
    # objects of torch, transformers and vLLM, which takes two thirds of a small engine's
    # processor time. The freeze exempts them at the start, the patch below skips the end:
    # the worker frees its arrays itself, and tests/serve/conftest.py collects per file.
    gc.freeze()
    llm = LLM(str(path), **(defaults | settings))
    try:
        yield llm
    finally:
        with mock.patch.object(gc, "collect"):
            llm.llm_engine.engine_core.shutdown()
        os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)


def engine_core(llm: Any) -> Any:
    """vLLM's EngineCore of an in-process LLM."""
    return llm.llm_engine.engine_core.engine_core


def worker(llm: Any) -> Any:
    """Our worker of an in-process LLM."""
    return engine_core(llm).model_executor.driver_worker.worker


class Greedy:
    """mlx-lm's single-sequence greedy continuation, remembered per prompt."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        import vllm_moe_compat
        from vllm_moe_compat.load.options import loading_with

        with vllm_moe_compat.applied(), loading_with(dtype=dtype):
            self.model, _ = load_model(path)
        self.model.set_dtype(getattr(mx, dtype))
        self._known: dict[tuple[int, ...], list[int]] = {}

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` tokens after ``prompt``."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        known = self._known.get(tuple(prompt), [])
        if len(known) < count:
            steps = generate_step(mx.array(list(prompt)), self.model, max_tokens=count)
            known = [int(token) for token, _ in steps]
            self._known[tuple(prompt)] = known
        return known[:count]
