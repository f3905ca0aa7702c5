"""Run a plan on MLX arrays.

The plan runs on the dict that mlx-lm's loader holds, whose arrays are mostly unread. Each
build removes its sources from the dict, which holds the only reference to them, so they are
freed. Each target is evaluated on its own, a few experts at a time (``build_tensor``), so the
peak is the final size plus a fraction of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.dtypes import stored_name
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.errors import CheckpointFileError, CompatError, InsufficientMemoryError
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.planner import Plan


def tensor_infos(weights: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Describe arrays as their headers would, reading nothing; FP8 shows as ``U8``."""
    return {
        name: TensorInfo(stored_name(array.dtype), tuple(array.shape))
        for name, array in weights.items()
    }


def run_plan(
    plan: Plan,
    weights: MutableMapping[str, mx.array],
    dtype: str,
    files: Mapping[str, str] | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Run the plan on ``weights``, in place.

    Args:
        plan: made for exactly these tensors.
        weights: the loader's dict; targets replace sources.
        dtype: ``bfloat16``, ``float16`` or ``float32``: the dtype of dequantised weights.
            ``float32`` also widens the tensors of ``plan.widen``.
        files: source → file, for messages.
        done: called after each build with the number of weights it consumed.

    Raises:
        CheckpointFileError: a source cannot be read; ``weights`` is empty.
        InsufficientMemoryError: memory ran out; ``weights`` is empty.
    """
    widen_and_drop(plan, weights, dtype)
    layer = ""
    try:
        for build in plan.builds:
            if build.layer != layer:
                mx.clear_cache()
                layer = build.layer
            weights.update(make_build(build, weights, dtype))
            done(len(build.weights))
    except (RuntimeError, ValueError, MemoryError) as error:
        weights.clear()
        raise failure(build, error.with_traceback(None), files or {}) from error
    finally:
        if plan.builds:
            mx.clear_cache()


def widen_and_drop(plan: Plan, weights: MutableMapping[str, mx.array], dtype: str) -> None:
    """Widen and drop the tensors that the plan lists, without reading them."""
    if dtype == "float32":
        for name in plan.widen:
            weights[name] = weights[name].astype(mx.float32)
    for name in (*plan.drops, *plan.ignored):
        weights.pop(name, None)


def failure(build: Build, error: BaseException, files: Mapping[str, str]) -> CompatError:
    """Return the exception for a build that failed with ``error``.

    The caller drops the traceback of ``error``, whose frames hold tensors.
    """
    known = sorted({files[n] for n in build.sources if files.get(n)})
    where = known[0] + (f" and {len(known) - 1} more" if len(known) > 1 else "") if known else ""
    head = f"{where + ': ' if where else ''}{' and '.join(build.targets)} could not be built"
    if isinstance(error, CompatError):
        return type(error)(f"{head}: {error}")
    if isinstance(error, MemoryError) or "alloc" in str(error):
        return InsufficientMemoryError(
            f"{head} ({error}), where enough free memory was expected; free some, or set "
            f"{QUANTIZE.name} to a smaller format."
        )
    return CheckpointFileError(
        f"{head} ({error}), where {len(build.weights):,} readable sources were expected; "
        "check that the file is complete, and download it again if not."
    )
