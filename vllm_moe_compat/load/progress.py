"""Progress bar for long loads, worded like vLLM's own bar for shards.

It appears after two seconds and only on a terminal. vLLM's ``use_tqdm_on_load`` (load config) and
tqdm's ``TQDM_DISABLE`` switch it off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_moe_compat.load.options import load_options

FORMAT = (
    "{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
)
DELAY_SECONDS = 2.0


@contextmanager
def bar(
    total: int, description: str = "Loading checkpoint tensors"
) -> Iterator[Callable[[int], object]]:
    """Show how many of ``total`` tensors are done; yield a function that adds finished ones."""
    if not total or not load_options().progress or not sys.stderr.isatty():
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
