"""The only place where a plan meets MLX.

In goes the very dict that mlx-lm's loader holds, still unread from disk for the
most part; sources are taken *out* of it as they are consumed, since that dict is
what keeps them in memory. Each target is evaluated on its own, a few experts at
a time, so the peak is the final size plus a fraction of one layer.

How a target is made is ``fill``'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.envs import DTYPE, QUANTIZE
from vllm_moe_compat.errors import CheckpointFileError, CompatError, InsufficientMemoryError
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.load.context import serving_dtype
from vllm_moe_compat.plan.planner import Build, Plan

_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
    mx.complex64: "C64",
}


def describe(weights: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Describe arrays as their headers would, reading nothing; FP8 shows as ``U8``."""
    return {
        name: TensorInfo(_NAMES.get(array.dtype, str(array.dtype)), tuple(array.shape))
        for name, array in weights.items()
    }


def target_dtype() -> str:
    """Return what FP8 weights become: the setting, else what serves, else the device's.

    MLX's CPU device gathers experts in float32 only.
    """
    chosen = DTYPE.read()
    if chosen != "auto":
        return chosen
    if serving := serving_dtype.get():
        return serving
    return "float32" if mx.default_device() == mx.Device(mx.cpu) else "bfloat16"


def packed_dtype() -> str:
    """Return the dtype of values that are packed at once, and of their scales.

    The setting, else what serves, else bfloat16: packed experts are multiplied in
    any dtype on every device.
    """
    chosen = DTYPE.read()
    return chosen if chosen != "auto" else serving_dtype.get() or "bfloat16"


def execute(
    plan: Plan,
    weights: MutableMapping[str, mx.array],
    dtype: str,
    files: Mapping[str, str] | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Carry out the plan on ``weights``, in place.

    Args:
        plan: made for exactly these tensors.
        weights: the loader's dict; sources go, targets come.
        dtype: ``bfloat16``, ``float16`` or ``float32`` for what is dequantised.
            ``float32`` also widens what ``sanitize`` computes with.
        files: where the sources come from, for messages.
        done: told after each build how many sources it took.

    Raises:
        CheckpointFileError: a build failed; nothing is left in ``weights`` then.
        InsufficientMemoryError: likewise, for want of memory.
    """
    prepare(plan, weights, dtype)
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


def prepare(plan: Plan, weights: MutableMapping[str, mx.array], dtype: str) -> None:
    """Widen and drop what the plan says; reads nothing."""
    if dtype == "float32":
        for name in plan.widen:
            weights[name] = weights[name].astype(mx.float32)
    for name in plan.drops:
        weights.pop(name, None)


def failure(build: Build, error: BaseException, files: Mapping[str, str]) -> CompatError:
    """Return what to raise for a build that failed with ``error``.

    The error's traceback is dropped by the caller: its frames hold tensors.
    """
    known = sorted({files[n] for n in build.sources if files.get(n)})
    where = known[0] + (f" and {len(known) - 1} more" if len(known) > 1 else "") if known else ""
    what = f"{where + ': ' if where else ''}{' and '.join(build.targets)} could not be built"
    if isinstance(error, MemoryError) or "alloc" in str(error):
        return InsufficientMemoryError(
            f"{what} ({error}), where memory for it was expected; free some, or set "
            f"{QUANTIZE.name} to a smaller format."
        )
    return CheckpointFileError(
        f"{what} ({error}), expected its {len(build.weights):,} sources to be readable; see "
        "whether the file is complete, and download it again if not."
    )
