"""Ask the worker before vLLM's engine pauses or resumes.

``EngineCore.sleep`` stops scheduling and aborts requests, and then calls the worker: if that
raises an error, every later request waits for ever. ``resume_scheduler`` lets steps run while the
worker has no weights, and an error in a step ends the engine. vLLM offers no place to refuse
before, so the methods are replaced by ones that ask our worker first. Engines of other workers
are not affected. Remove when vLLM asks its executor before it pauses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_moe_compat.backend.vllm.sleep import SleepMode

# Not ``__wrapped__``: a release may decorate its own methods.
_MARK = "asks_moe_compat_first"


def ask_worker_first() -> None:
    """Replace the methods of vLLM's engine, of those that the release has; idempotent."""
    from vllm.v1.engine.core import EngineCore

    def sleep(worker: SleepMode, level: int = 1, *_: Any, **__: Any) -> None:
        worker.permit(level)

    _ask(EngineCore, "sleep", sleep)
    _ask(EngineCore, "release_kv_cache_memory", SleepMode.permit_release)
    _ask(EngineCore, "resume_scheduler", SleepMode.refuse_resume)


def _ask(engine: type, name: str, question: Callable[..., None]) -> None:
    method = vars(engine).get(name)
    if method is None or hasattr(method, _MARK):
        return

    @functools.wraps(method)
    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        wrapper = getattr(self.model_executor, "driver_worker", None)
        sleep_mode = getattr(getattr(wrapper, "worker", None), "sleep_mode", None)
        if not isinstance(sleep_mode, SleepMode):
            return method(self, *args, **kwargs)
        question(sleep_mode, *args, **kwargs)
        try:
            return method(self, *args, **kwargs)
        except Exception:
            sleep_mode.revoke()
            raise

    setattr(asked, _MARK, True)
    setattr(engine, name, asked)
