"""What MLX's function transformations cannot do with experts on disk.

A pass is evaluated in parts while it is computed, which ``mx.compile`` and ``mx.vmap`` do not
allow. A gradient is allowed, but it would be computed after the pass, on slots that hold other
experts by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.errors import SettingError

_MLX_WORDS = "function transformations"


@contextmanager
def refuse_tracing() -> Iterator[None]:
    """Say in words of this package why an array cannot be evaluated.

    Raises:
        SettingError: the arrays are traced.
    """
    try:
        yield
    except ValueError as error:
        if _MLX_WORDS not in str(error):
            raise
        raise SettingError(
            f"{EXPERT_CACHE.name}={EXPERT_CACHE.read()}: experts are read while a pass is "
            "computed, which mx.compile and mx.vmap do not allow; set it to off to transform the "
            "model."
        ) from error


def forward_only(x: mx.array) -> mx.array:
    """Return ``x``; a gradient through it raises ``SettingError``."""
    same: Any = _same(x)
    result: mx.array = same
    return result


@mx.custom_function
def _same(x: mx.array) -> mx.array:
    return x


@_same.vjp
def _refuse_gradient(*_: Any) -> None:
    raise SettingError(
        f"{EXPERT_CACHE.name}={EXPERT_CACHE.read()}: slots hold other experts once a pass is "
        "computed, so there is no gradient; set it to off to train the model."
    )
