"""What a container of experts cannot see in its arguments: the pass that it computes a part of.

A pass is a batch ``[B, T]``, padded on the right. Whoever runs it says so by ``current_pass``;
then padding reads no experts, and an expert that cannot be read fails the rows that need it, not
the pass. Outside of one, as in ``mlx_lm.generate``, every position counts and an error is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.errors import CompatError

Mask = npt.NDArray[np.bool_]


@dataclass(slots=True)
class CurrentPass:
    """One forward pass over a batch.

    Attributes:
        real: which positions are no padding, bool ``[B, T]``.
        failed_rows: row → why its experts could not be read. What the pass computes for such a
            row is not valid.
        at_end: called once the pass is evaluated.
    """

    real: Mask
    failed_rows: dict[int, CompatError] = field(default_factory=dict)
    at_end: set[Callable[[], None]] = field(default_factory=set)

    def fail(self, positions: npt.NDArray[np.int64], error: CompatError) -> None:
        """Note that ``positions`` of the flattened batch cannot be computed."""
        for row in np.unique(positions // self.real.shape[1]).tolist():
            self.failed_rows.setdefault(row, error)


_current: ContextVar[CurrentPass | None] = ContextVar("current_pass", default=None)
_building: ContextVar[bool] = ContextVar("building_only", default=False)


@contextmanager
def current_pass(rows: int, tokens: int, lengths: Sequence[int]) -> Iterator[CurrentPass]:
    """Run a pass over ``[rows, tokens]``, of whose row ``b`` the first ``lengths[b]`` are real.

    All that is wanted of the pass has to be evaluated, or scheduled by ``async_eval``, before
    the context ends: afterwards experts may be overwritten.
    """
    real = np.arange(tokens) < np.asarray(lengths, dtype=np.int64)[:, None]
    if real.shape[0] != rows:
        raise ValueError(f"a pass of {rows} rows has {real.shape[0]} lengths")
    running = CurrentPass(real)
    token = _current.set(running)
    try:
        yield running
        if running.at_end:
            mx.synchronize()
    finally:
        _current.reset(token)
        for call in running.at_end:
            call()


def running_pass() -> CurrentPass | None:
    """Return the pass that is being run, if it is known."""
    return _current.get()


@contextmanager
def building_only() -> Iterator[None]:
    """Build graphs that are never evaluated: containers read nothing and evaluate nothing.

    Their results have the right shape and dtype, and no meaning.
    """
    token = _building.set(True)
    try:
        yield
    finally:
        _building.reset(token)


def is_building_only() -> bool:
    """Return whether graphs are built that are never evaluated."""
    return _building.get()
