"""Options of the loads inside a ``with`` block.

mlx-lm's ``load_model`` is between the caller and the hooks and has no argument for options, so
a context variable carries them, separately for each thread and task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_moe_compat.plan.serving import Serving, serving

if TYPE_CHECKING:
    from vllm_moe_compat.execute.quantize import Arrange, LoadExecutor
    from vllm_moe_compat.plan.planned_load import PlannedLoad

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options of a load.

    Attributes:
        dtype: serving dtype, which dequantised weights get unless the user has set another;
            None outside of serving.
        hooks: whether the hooks are active; inactive ones only call the original.
        executor: replaces ``execute.quantize.load_quantized``; None for the default.
        at_once: whether tensors are made at once even if ``load_model`` is called with
            ``lazy=True``, since the caller needs all of them.
        progress: whether long loads show a progress bar.
        record: whether ``last_report`` returns the report of the load.
        settle: changes classes and dtypes of a module's layers into those that serve; applied to
            experts that stay on disk.
        arrange: called with the named builds before tensors are made, to make a part of the
            model's tensors only; the plan is then complete.
        ranks: the number of ranks that divide the model; ``arrange`` does it.
        layers: the first layer that is loaded and the one after the last, by the number of
            layers, where ranks have layers each; None where each has a part of all layers.
        processes: the number of processes of this machine that load as much at the same time.
        view: takes the planned load, and returns that of a part of the checkpoint as a model of
            its own, which is loaded instead.
    """

    dtype: str | None = None
    hooks: bool = True
    executor: LoadExecutor | None = None
    at_once: bool = False
    progress: bool = True
    record: bool = True
    settle: Callable[[Any], None] | None = None
    arrange: Arrange | None = None
    ranks: int = 1
    layers: Callable[[int], tuple[int, int]] | None = None
    processes: int = 1
    view: Callable[[PlannedLoad], PlannedLoad] | None = None


_current: ContextVar[LoadOptions] = ContextVar("vllm_moe_compat_load_options")
_DEFAULT = LoadOptions()


def load_options() -> LoadOptions:
    """Return the options of the current context."""
    return _current.get(_DEFAULT)


def serving_here() -> Serving:
    """Return dtypes and quantisation setting of a load in the current context."""
    import mlx.core as mx

    options = load_options()
    device = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "gpu"
    found = serving(device, options.dtype, exact=options.executor is not None)
    return replace(
        found,
        complete=options.arrange is not None,
        experts_apart=found.experts_apart and options.executor is None,
        ranks=options.ranks,
    )


@contextmanager
def loading_with(**changes: Any) -> Iterator[None]:
    """Change options for the loads inside the block.

    Args:
        **changes: fields of ``LoadOptions``.

    Raises:
        ValueError: ``dtype`` is not a serving dtype.
    """
    options = replace(load_options(), **changes)
    if options.dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {options.dtype!r}; use bfloat16, float16 or float32.")
    token = _current.set(options)
    try:
        yield
    finally:
        _current.reset(token)
