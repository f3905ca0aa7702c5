"""The engine's process ends when its front end does, and on Ctrl-C while it starts.

vLLM runs the engine, and with it our worker, in a child process of the front end, and leaves two
gaps, both of which keep the model in memory for nobody:

- A front end that is killed cannot end its child, which then waits for requests for ever; nor can
  an engine that is killed end its ranks.
- vLLM 0.32 only notes a signal that arrives while the engine starts, and acts on it when the
  model is loaded and warm. The front end waits for the engine meanwhile, so Ctrl-C during a load
  of minutes appears to do nothing.

An engine in the process of a script (``VLLM_ENABLE_V1_MULTIPROCESSING=0``) is left alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from vllm_moe_compat.log import logger

GRACE = 5.0
"""Seconds for an orderly end, after which the process ends in any case."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EngineProcess:
    """Watches over the process that the worker is in."""

    def __init__(self, this: str = "the engine", parent: str = "the front end") -> None:
        """Take the names of the process and of its parent, for messages."""
        self._this, self._parent = this, parent
        self._handlers: dict[signal.Signals, Any] = {}

    def starting(self) -> None:
        """End with the front end from now on, and on SIGINT or SIGTERM until ``started``."""
        parent = multiprocessing.parent_process()
        if parent is None:
            return
        threading.Thread(
            target=_end_with,
            args=(parent, self._parent, self._this),
            name="moe-compat-front-end",
            daemon=True,
        ).start()
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, _stop) for number in _SIGNALS}

    def started(self) -> None:
        """Give the signals back to vLLM; idempotent."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    logger.info("%s during the start: the engine ends", signal.Signals(number).name)
    raise SystemExit(128 + number)


def _end_with(parent: Any, parent_is: str, this: str) -> None:
    """Wait for the end of the process that started this one, then end it."""
    parent.join()
    logger.warning(
        "%s (process %d) has ended without ending %s: %s ends too",
        *(parent_is, parent.pid, this, this),
    )
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
