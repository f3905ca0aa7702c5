"""Caches of state layers for one forward pass: gated-delta, Mamba, short convolutions.

The caches are mlx-lm's own ``ArraysCache``. If the pass is padded on the right they get the rows'
lengths, so that padding changes no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.pages.state_pool import State


def make_caches(states: Sequence[State], lengths: npt.NDArray[np.int64]) -> list[Any]:
    """Return one cache per layer; ``lengths [B]`` are the new tokens of each row."""
    from mlx_lm.models.cache import ArraysCache

    padded = bool((lengths != lengths.max()).any())
    caches = []
    for state in states:
        cache = ArraysCache(size=len(state))
        cache.cache = list(state)
        if padded:
            cache.lengths = mx.array(lengths.astype(np.int32))
        caches.append(cache)
    return caches


def new_states(caches: Sequence[Any]) -> list[State]:
    """Return the states that the layers left in their caches."""
    return [tuple(cache.cache) for cache in caches]
