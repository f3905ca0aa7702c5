"""Whether tensors are made at once, or as graphs that MLX evaluates when they are used.

A load that its caller wants lazy (``load_model(lazy=True)``: pipeline stages keep a range of
layers, and only that is to be read) builds graphs and reads nothing. A graph, too, makes a large
tensor a few experts at a time, each after the one before. MLX works on some twenty tensors of one
evaluation in turns and frees sources as it goes, so beside the results an evaluation holds about
the stored bytes of twenty tensors, whatever the size of the model. numpy's faster paths for the
CPU read at once and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

_lazy: ContextVar[bool] = ContextVar("vllm_moe_compat_builds_lazily", default=False)


@contextmanager
def building(*, lazily: bool) -> Iterator[None]:
    """Make the tensors of the ``with`` block lazily or at once."""
    token = _lazy.set(lazily)
    try:
        yield
    finally:
        _lazy.reset(token)


def is_lazy() -> bool:
    """Whether nothing may be evaluated here."""
    return _lazy.get()


def settle(*arrays: Any) -> None:
    """Evaluate arrays, or trees of them, unless tensors are made lazily."""
    if not is_lazy():
        mx.eval(*arrays)
