"""Who called ``load_config``, found on the stack.

mlx-lm reads a config for a load and for a tokenizer's defaults, and hands neither the purpose
nor the arguments of ``load_model`` to ``load_config``. Wrapping ``load_model`` as well would
miss every library that imported the function by name; ``load_config`` is always called through
the module. So the hook looks for the frames of mlx-lm's own functions, by module and name:
wrappers of other libraries may be in between. A contract test checks the names.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

_LOAD, _TOKENIZER = "load_model", "_tokenizer_defaults"


@dataclass(frozen=True, slots=True)
class Caller:
    """The call of mlx-lm's that ``load_config`` serves.

    Attributes:
        tokenizer: whether the config is read for a tokenizer, and no tensor will follow.
        lazy: whether the caller of ``load_model`` wants parameters that are not evaluated.
        strict: whether ``load_model`` refuses a model with missing parameters.
        call: number that tells this running call of ``load_model`` from others; 0 for none.
    """

    tokenizer: bool = False
    lazy: bool = False
    strict: bool = True
    call: int = 0


def find(utils: Any) -> Caller:
    """Return the nearest caller; ``utils`` is the module ``mlx_lm.utils``."""
    frame = _nearest(utils)
    if frame is None:
        return Caller()
    if frame.f_code.co_name == _TOKENIZER:
        return Caller(tokenizer=True)
    given = frame.f_locals
    return Caller(
        lazy=bool(given.get("lazy", False)),
        strict=bool(given.get("strict", True)),
        call=id(frame),
    )


def _nearest(utils: Any) -> FrameType | None:
    names, module = (_LOAD, _TOKENIZER), vars(utils)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in names and frame.f_globals is module:
            return frame
        frame = frame.f_back
    return None
