"""A dry run of a model's own code on paged caches.

Model code may compute with ``cache.offset`` as a number, or apply one mask to all sequences. Such
code fails, or is wrong, when a pass holds several sequences. The dry run builds a pass of one
token per sequence on pools of a few pages and never evaluates it: the errors appear while MLX
builds the graph. If several sequences fail and one succeeds, the model is served one sequence at
a time, with the failure as the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache

from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer, nest_caches
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.paged_kv import PagedKV
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.expert_cache.current_pass import building_only

BLOCK = 16
# A number of heads that no model has: a mask [B, 1, 1, L] must not fit another axis by accident.
ROWS = 7
# Raised by MLX, numpy and Python if a vector is used as a number or shapes do not match.
FAILURES = (TypeError, ValueError, AttributeError, IndexError, RuntimeError)


@dataclass(frozen=True, slots=True)
class DryRun:
    """Result of a dry run.

    Attributes:
        layers: the descriptions, marked ``single_sequence`` where that is required.
        failure: type and message of the exception raised with several sequences; empty if none
            was. The exception itself would keep the dry run's arrays alive.
    """

    layers: list[Layer]
    failure: str = ""


def dry_run(model: nn.Module, layers: Sequence[Layer]) -> DryRun:
    """Build a pass of several sequences on paged caches; fall back to a pass of one.

    Raises:
        UnsupportedServingError: the model's code fails with one sequence, too.
    """
    failure = _failure(model, layers, rows=ROWS)
    if failure is None:
        return DryRun(list(layers))
    # Its frames hold arrays of the pass and this function's frame, which holds the exception.
    failure.__traceback__ = None
    single = [
        replace(layer, single_sequence=True) if isinstance(layer, AttentionLayer) else layer
        for layer in layers
    ]
    fatal = _failure(model, single, rows=1)
    if fatal is not None:
        raise UnsupportedServingError(
            f"The embedded MLX backend cannot serve {type(model).__module__}: its code does not "
            f"run on paged caches ({type(fatal).__name__}: {fatal}); use mlx-lm's own server for "
            "this model."
        ) from fatal
    return DryRun(single, f"{type(failure).__name__}: {failure}")


def _failure(model: nn.Module, layers: Sequence[Layer], rows: int) -> Exception | None:
    """Return the exception raised when a pass over ``rows`` sequences is built, or None."""
    offsets = np.arange(3, 3 + rows, dtype=np.int64)
    tables = np.arange(1, 1 + rows, dtype=np.int64)[:, None]
    full = AttentionMetadata(offsets, np.ones(rows, dtype=np.int64), tables, BLOCK)
    caches: list[Any] = []
    for layer in layers:
        if isinstance(layer, AttentionLayer):
            pool = PagePool(1 + rows, layer.token_bytes * BLOCK, layer.dtype)
            metadata = full if layer.window is None else full.with_window(layer.window)
            caches.append(PagedKV(layer, pool, metadata, attends_itself=layer.attends_itself))
        else:
            cache = ArraysCache(size=len(layer.shapes))
            cache.cache = [
                mx.zeros((rows, *shape), dtype=dtype)
                for shape, dtype in zip(layer.shapes, layer.dtypes, strict=True)
            ]
            caches.append(cache)
    try:
        with building_only():
            model(mx.zeros((rows, 1), dtype=mx.int32), cache=nest_caches(layers, caches))
    except UnsupportedServingError:
        raise
    except FAILURES as failure:
        return failure
    return None
