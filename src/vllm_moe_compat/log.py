"""The package's logger.

Outside vLLM it is an ordinary library logger. Under vLLM, loggers outside
``vllm.*`` have no handler and their INFO lines vanish, so the plugin lends this
logger vLLM's own handlers, once per process. Every line begins with
``moe_compat:``, since vLLM's format names the file but not the package.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
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


def adopt_vllm_handlers() -> None:
    """Give our logger the handlers and level of vLLM's; idempotent.

    Does nothing where vLLM has no handlers (``VLLM_CONFIGURE_LOGGING=0``): the
    user's own logging configuration then covers us like any other library.
    Plugins may be loaded before vLLM has configured its logging, so this imports
    the module that does.
    """
    import vllm.logger  # noqa: F401

    ours, theirs = logger.logger, logging.getLogger("vllm")
    if not theirs.handlers:
        return
    for handler in theirs.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
    if ours.level == logging.NOTSET:
        ours.setLevel(theirs.level)
    ours.propagate = False
