"""Ask the worker before vLLM's engine pauses or resumes.

``EngineCore.sleep`` stops scheduling and aborts requests, and then calls the worker: if that
raises an error, every later request waits for ever. ``resume_scheduler`` lets steps run while the
worker has no weights, and an error in a step ends the engine. vLLM offers no place to refuse
before, so the methods are replaced by ones that ask our worker first. Engines of other workers
are not affected. An engine of several ranks, whose workers are in other processes, does not sleep.
Remove when vLLM asks its executor before it pauses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_moe_compat.errors import UnsupportedServingError

if TYPE_CHECKING:
    from vllm_moe_compat.backend.vllm.sleep import SleepMode

SEVERAL_RANKS = (
    "An engine of several ranks does not give memory back; end it, and start it again. Nothing was "
    "paused."
)
# Not ``__wrapped__``: a release may decorate its own methods.
_MARK = "asks_moe_compat_first"


def ask_worker_first() -> None:
    """Replace the methods of vLLM's engine, of those that the release has; idempotent."""
    from vllm.v1.engine.core import EngineCore

    def sleep(mode: SleepMode | None, level: int = 1, *_: Any, **__: Any) -> None:
        if mode is not None:
            mode.permit(level)
        elif level:
            raise UnsupportedServingError(SEVERAL_RANKS)

    def release(mode: SleepMode | None, *_: Any, **__: Any) -> None:
        if mode is None:
            raise UnsupportedServingError(SEVERAL_RANKS)
        mode.permit_release()

    def resume(mode: SleepMode | None, *_: Any, **__: Any) -> None:
        if mode is not None:
            mode.refuse_resume()

    _ask(EngineCore, "sleep", sleep)
    _ask(EngineCore, "release_kv_cache_memory", release)
    _ask(EngineCore, "resume_scheduler", resume)


def _ask(engine: type, name: str, question: Callable[..., None]) -> None:
    method = vars(engine).get(name)
    if method is None or hasattr(method, _MARK):
        return

    @functools.wraps(method)
    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        wrapper = getattr(self.model_executor, "driver_worker", None)
        worker = getattr(wrapper, "worker", self.model_executor)
        if not type(worker).__module__.startswith("vllm_moe_compat."):
            return method(self, *args, **kwargs)
        sleep_mode: SleepMode | None = getattr(worker, "sleep_mode", None)
        question(sleep_mode, *args, **kwargs)
        try:
            return method(self, *args, **kwargs)
        except Exception:
            if sleep_mode is not None:
                sleep_mode.revoke()
            raise

    setattr(asked, _MARK, True)
    setattr(engine, name, asked)
