"""Options of the loads inside a ``with`` block.

mlx-lm's ``load_model`` stands between the caller and our hooks and has no argument for
them, so they travel in one context variable, per thread and task.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_moe_compat.plan.serving import Serving, serving

if TYPE_CHECKING:
    from vllm_moe_compat.execute.quantize import LoadExecutor

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How checkpoints are loaded.

    Attributes:
        dtype: the dtype that serves: dequantised weights get it, unless the user has set
            another; None where nothing serves.
        hooks: whether our hooks do anything, or only call on.
        executor: makes the tensors in place of ``execute.quantize.load_quantized``; None for the
            usual way.
        progress: whether long loads show a bar.
        record: whether the load counts as the process's last one.
    """

    dtype: str | None = None
    hooks: bool = True
    executor: LoadExecutor | None = None
    progress: bool = True
    record: bool = True


_current: ContextVar[LoadOptions] = ContextVar("vllm_moe_compat_load_options")
_DEFAULT = LoadOptions()


def load_options() -> LoadOptions:
    """Return the options in force here."""
    return _current.get(_DEFAULT)


def serving_here() -> Serving:
    """Return the dtypes that a load in this process is for."""
    import mlx.core as mx

    options = load_options()
    device = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "gpu"
    return serving(device, options.dtype, exact=options.executor is not None)


@contextmanager
def loading_with(**changes: Any) -> Iterator[None]:
    """Change options for the loads inside; arguments are fields of ``LoadOptions``.

    Raises:
        ValueError: a dtype that nothing serves in.
    """
    options = replace(load_options(), **changes)
    if options.dtype not in (None, *DTYPES):
        raise ValueError(
            f"{options.dtype!r} is no dtype to serve in; use bfloat16, float16 or float32."
        )
    token = _current.set(options)
    try:
        yield
    finally:
        _current.reset(token)
