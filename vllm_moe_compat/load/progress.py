"""Progress bar for long loads, worded like vLLM's own bar for shards.

It appears after two seconds and only on a terminal. vLLM's ``use_tqdm_on_load`` (load config) and
tqdm's ``TQDM_DISABLE`` switch it off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

FORMAT = (
    "{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
)
DELAY_SECONDS = 2.0

_enabled: ContextVar[bool] = ContextVar("vllm_moe_compat_progress", default=True)


@contextmanager
def enabled(value: bool) -> Iterator[None]:
    """Show a bar for loads inside the block only if ``value``."""
    token = _enabled.set(value)
    try:
        yield
    finally:
        _enabled.reset(token)


@contextmanager
def bar(
    total: int, description: str = "Loading checkpoint tensors"
) -> Iterator[Callable[[int], object]]:
    """Show how many of ``total`` tensors are done; yield a function that adds finished ones."""
    if not total or not _enabled.get() or not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=description,
        unit="tensor",
        bar_format=FORMAT,
        delay=DELAY_SECONDS,
        mininterval=0.5,
    ) as shown:
        yield shown.update
        # A fused tensor counts once and yields two, so the count may end below the total.
        shown.update(total - shown.n)
