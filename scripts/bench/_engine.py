"""The embedded backend under vLLM's engine, in this process, driven step by step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _contexts import Context


class Ours:
    """The embedded backend under vLLM's engine, in this process."""

    def __init__(self, path: Path, longest: int, batch: int, **settings: Any) -> None:
        """``longest``: tokens of a sequence; ``settings``: vLLM's."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_MOE_COMPAT_BACKEND", "embedded")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        from vllm_moe_compat.backend.step import compiled_decode

        # A server compiles later; what it then costs per step is measured here.
        compiled_decode.PASSES_BEFORE_COMPILING = 0
        self.llm = LLM(
            str(path),
            skip_tokenizer_init=True,
            dtype="float32",
            **{
                "max_model_len": longest,
                "max_num_seqs": batch,
                "max_num_batched_tokens": 4096,
                "enable_prefix_caching": False,
                "seed": 0,
            }
            | settings,
        )
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.worker = core.model_executor.driver_worker.worker
        self.contexts: dict[int, Context] = {}
        from _contexts import instead_of_prefills

        runner = self.worker.runner
        runner._prefill = instead_of_prefills(runner, self.contexts)
        self.layers = runner.storage.layers
        self.inside = 0.0
        for name in ("execute_model", "sample_tokens"):
            setattr(self.worker, name, self._timed(getattr(self.worker, name)))

    def _timed(self, function: Any) -> Any:
        asynchronous = self.engine.vllm_config.scheduler_config.async_scheduling

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                result = function(*args, **kwargs)
                # Without async scheduling vLLM asks at once for what is still computed.
                if not asynchronous and hasattr(result, "get_output"):
                    result = result.get_output()
                return result
            finally:
                self.inside += time.perf_counter() - began

        return timed

    @contextmanager
    def running(
        self, prompts: list[list[int]], contexts: list[Context], steps: int
    ) -> Iterator[None]:
        """With all requests generating."""
        self.contexts.update(enumerate(contexts))
        self.tokens: dict[str, list[int]] = {}
        ids = [self.add(str(i), prompt, steps) for i, prompt in enumerate(prompts)]
        while len(self.tokens) < len(prompts):
            self._step()
        try:
            yield
        finally:
            self.drop(ids)
            self.contexts.clear()

    def _step(self) -> int:
        outputs = self.engine.step()
        for output in outputs:
            self.tokens[output.request_id] = output.outputs[0].token_ids
        return len(outputs)

    def decode(self, steps: int, batch: int) -> tuple[float, float]:
        """Seconds for that many steps, and what the worker took of them.

        With async scheduling a pass is under way before and after them.
        """
        import mlx.core as mx

        mx.synchronize()
        self.inside, done = 0.0, 0
        began = time.perf_counter()
        while done < steps * batch:
            done += self._step()
        ended = time.perf_counter()
        mx.synchronize()
        rest = time.perf_counter() - ended
        return ended + rest - began, self.inside + rest

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Without compiled decode passes."""
        compiled = self.worker.runner.forward.compiled
        before, compiled.failure = compiled.failure, "switched off"
        try:
            yield
        finally:
            compiled.failure = before

    def worker_seconds(self) -> float:
        """What the worker takes of one engine step."""
        self.inside = 0.0
        self.engine.step()
        return self.inside

    def budget(self, tokens: int) -> None:
        """At most so many tokens in a step from now on."""
        self.engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = tokens

    def add(self, name: str, prompt: list[int], tokens: int = 1) -> str:
        """A greedy request beside those that run; returns the id to abort it by."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return str(self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params))

    def drop(self, ids: list[str]) -> None:
        """Abort requests, and let everyone else end too."""
        self.engine.abort_request(ids, internal=True)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.engine.step()

    def close(self) -> None:
        self.engine.engine_core.shutdown()
