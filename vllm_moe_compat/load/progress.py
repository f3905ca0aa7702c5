"""A bar for long loads, in the words of vLLM's own bar for shards.

It appears after two seconds, on a terminal only, and not where vLLM's is switched
off (``use_tqdm_on_load`` of its load config) or tqdm's (``TQDM_DISABLE``).
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

wanted: ContextVar[bool] = ContextVar("vllm_moe_compat_progress", default=True)


@contextmanager
def wanted_as(shown: bool) -> Iterator[None]:
    """Let loads inside show a bar, or not."""
    token = wanted.set(shown)
    try:
        yield
    finally:
        wanted.reset(token)


@contextmanager
def bar(total: int, words: str = "Loading checkpoint tensors") -> Iterator[Callable[[int], object]]:
    """Show how many of ``total`` tensors are done; yields what to tell of each step."""
    if not total or not wanted.get() or not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=words,
        unit="tensor",
        bar_format=FORMAT,
        delay=DELAY_SECONDS,
        mininterval=0.5,
    ) as shown:
        yield shown.update
        # Fused tensors are counted once and give two.
        shown.update(total - shown.n)
