"""The package's logger.

Outside vLLM it is an ordinary library logger. Under vLLM, loggers outside ``vllm.*`` have no
handler and their INFO lines are lost, so the plugin makes vLLM's logger the parent of this one.
Every line begins with ``moe_compat:``, since vLLM's format names the file but not the package.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


class _Prefixed(_Adapter):
    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[str, MutableMapping[str, Any]]:
        return f"moe_compat: {msg}", kwargs


logger = _Prefixed(logging.getLogger("vllm_moe_compat"), {})
_silent: ContextVar[bool] = ContextVar("vllm_moe_compat_silent", default=False)
logger.logger.addFilter(lambda record: not _silent.get())


@contextmanager
def silence() -> Iterator[None]:
    """Suppress the package's log lines inside the block, in this thread only."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def speak_through_vllm() -> None:
    """Make vLLM's logger the parent of ours; idempotent.

    A parent is used and no copied handler, since vLLM configures its logging only after it has
    loaded its plugins, and again in every process: handlers and levels stay vLLM's at any time.
    """
    ours = logger.logger
    ours.parent = logging.getLogger("vllm")
    # Levels are cached per logger; setting one empties the caches.
    ours.setLevel(logging.NOTSET)
