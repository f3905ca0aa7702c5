"""Reads on a small pool of threads.

Reading is waiting, for a disk or for memory to be copied, and numpy's loops run beside each other,
too. MLX is not used here: it computes on the calling thread.

What is converted is read a few rows at a time into memory that each thread keeps: it stays in the
processor's cache, and new memory would cost more than the arithmetic.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from vllm_moe_compat.execute.stored_tensors import Bytes, StoredTensor

THREADS = 8
"""Reads at once: enough to keep a disk busy."""
_WORTH = 2**18
"""Bytes that are worth a turn on the pool."""
_BAND = 2**18
"""Bytes that are read and converted at once, at least two rows."""
_kept = threading.local()


@dataclass(frozen=True, slots=True)
class Task:
    """Something to read, and perhaps to convert with numpy.

    Attributes:
        tensors: what is read.
        run: reads it.
    """

    tensors: list[StoredTensor]
    run: Callable[[], None]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(tensor.nbytes for tensor in self.tensors)


def start(tasks: Sequence[Task]) -> list[Future[None]]:
    """Begin with tasks; small ones share a turn."""
    turns: list[Future[None]] = []
    turn: list[Task] = []
    for task in tasks:
        turn.append(task)
        if sum(one.nbytes for one in turn) >= _WORTH:
            turns.append(_pool().submit(_run, turn))
            turn = []
    if turn:
        turns.append(_pool().submit(_run, turn))
    return turns


def bands(tensor: StoredTensor) -> Iterator[tuple[int, Bytes]]:
    """Read a matrix ``[O, I]`` or ``[1, O, I]``, or biases ``[O]`` or ``[1, O]``, in bands.

    Yields:
        The first row of the band, an even number, and its bytes ``uint8 [nbytes]``, which the
        next band overwrites.
    """
    rows = (1, *tensor.shape)[-2]
    width = tensor.nbytes // max(rows, 1)
    step = max(2, _BAND // max(width, 1) // 2 * 2)
    memory = getattr(_kept, "memory", None)
    if memory is None or len(memory) < min(step, rows) * width:
        memory = _kept.memory = np.empty(max(_BAND, min(step, rows) * width), np.uint8)
    for first in range(0, rows, step):
        part = tensor[..., first : first + step, :] if tensor.ndim > 1 else tensor
        target = memory[: part.nbytes]
        part.read_into(target)
        yield first, target


def _run(turn: Sequence[Task]) -> None:
    for task in turn:
        task.run()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="read-experts")


# A forked process has none of the threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_pool.cache_clear)


def end_threads() -> None:
    """End the threads, which begin anew with the next reads."""
    if _pool.cache_info().currsize:
        _pool().shutdown()
        _pool.cache_clear()
