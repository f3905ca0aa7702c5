"""The package's logger.

Outside vLLM it is an ordinary library logger. Under vLLM, loggers outside
``vllm.*`` have no handler and their INFO lines vanish, so the plugin lends this
logger vLLM's own handlers, once per process.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm_moe_compat")


def adopt_vllm_handlers() -> None:
    """Give our logger the handlers and level of vLLM's; idempotent.

    Does nothing where vLLM has no handlers (``VLLM_CONFIGURE_LOGGING=0``): the
    user's own logging configuration then covers us like any other library.
    """
    theirs = logging.getLogger("vllm")
    if not theirs.handlers:
        return
    for handler in theirs.handlers:
        if handler not in logger.handlers:
            logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(theirs.level)
    logger.propagate = False
