"""The only place where a plan meets MLX.

In goes the very dict that mlx-lm's loader holds, still unread from disk for the
most part; sources are taken *out* of it as they are consumed, since that dict is
what keeps them in memory. Each target is evaluated on its own, a few experts at
a time, so the peak is the final size plus a fraction of one layer.

A product ``q * scale`` is formed in float32 and rounded once to the target, so
the result is bit for bit that of dequantising every expert first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from vllm_moe_compat.context import serving_dtype
from vllm_moe_compat.envs import DTYPE, QUANTIZE
from vllm_moe_compat.errors import CheckpointFileError, CompatError, InsufficientMemoryError
from vllm_moe_compat.layout import TensorInfo
from vllm_moe_compat.plan import (
    Build,
    DequantizeBlockFp8,
    JoinGateUp,
    Op,
    Plan,
    QuantizeBlockFp8,
    Requantize,
    SplitGateUp,
    StackExperts,
    Unpack,
    UnstackExperts,
)

TEMPORARY_BYTES = 16 * 2**20
"""How large the float32 intermediates of one dequantisation step may be."""

E4M3_MAX = 448.0

_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
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
            targets = _make(build, weights, dtype)
            mx.eval(targets)
            weights.update(zip(build.targets, targets, strict=True))
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
    known = sorted({files[n] for n in (*build.weights, *build.scales) if files.get(n)})
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


def take(build: Build, weights: MutableMapping[str, mx.array]) -> Arrays:
    """Take the build's sources out of ``weights``."""
    return Arrays(
        [weights.pop(name) for name in build.weights],
        [weights.pop(name) for name in build.scales],
    )


def _make(build: Build, weights: MutableMapping[str, mx.array], dtype: str) -> list[mx.array]:
    operand = take(build, weights)
    for op in build.ops:
        operand = run(op, operand, dtype)
    return [t.take(0, t.shape[0]) if isinstance(t, Stack) else t for t in operand.weights]


class Stack:
    """``E`` equal arrays seen as one ``[E, …]`` that is never built as a whole."""

    def __init__(self, parts: list[mx.array]) -> None:
        self._parts: list[Any] = list(parts)
        self.shape = (len(parts), *parts[0].shape)

    def take(self, start: int, stop: int) -> mx.array:
        """Return ``[start:stop]`` as an array and let go of those parts."""
        chunk = mx.stack(self._parts[start:stop])
        self._parts[start:stop] = [None] * (stop - start)
        return chunk


@dataclass(slots=True)
class Arrays:
    """An ``Operand`` with its values."""

    weights: list[Any]
    scales: list[Any] = field(default_factory=list)
    biases: list[Any] = field(default_factory=list)


def run(op: Op, given: Arrays, dtype: str) -> Arrays:
    """Carry out one operation; ``dtype`` is what dequantising gives."""
    match op:
        case StackExperts():
            return Arrays([Stack(given.weights)], [mx.stack(given.scales)] if given.scales else [])
        case UnstackExperts(experts):
            return Arrays(*([t[e] for t in ts for e in range(experts)] for ts in _both(given)))
        case DequantizeBlockFp8(block):
            (weight,), (scale,) = given.weights, given.scales
            return Arrays([dequantize(weight, scale, block, dtype)])
        case QuantizeBlockFp8(block):
            weight, scale = quantize(given.weights[0], block)
            return Arrays([weight], [scale])
        case SplitGateUp():
            (fused,) = given.weights
            half = fused.shape[-2] // 2
            # Copies: a slice would keep the fused tensor alive.
            return Arrays(
                [mx.contiguous(fused[..., :half, :]), mx.contiguous(fused[..., half:, :])]
            )
        case JoinGateUp():
            return Arrays([mx.concatenate(given.weights, axis=-2)])
        case Requantize(bits, group, mode):
            packed = [mx.quantize(w, group, bits, mode=mode) for w in given.weights]
            return Arrays(*([p[i] for p in packed if len(p) > i] for i in range(3)))
        case Unpack(bits, group, mode):
            biases = given.biases or [None] * len(given.weights)
            parts = zip(given.weights, given.scales, biases, strict=True)
            kind = _DTYPES[dtype]
            return Arrays(
                [mx.dequantize(w, s, b, group, bits, mode=mode, dtype=kind) for w, s, b in parts]
            )


def _both(given: Arrays) -> tuple[list[Any], list[Any]]:
    return given.weights, given.scales


def dequantize(
    weight: mx.array | Stack, scale: mx.array, block: tuple[int, int], dtype: str
) -> mx.array:
    """Multiply E4M3 bytes by their block scales.

    Args:
        weight: ``[…, O, I]``, uint8.
        scale: ``[…, ceil(O/b0), ceil(I/b1)]``, any float.
        block: ``(b0, b1)``.
        dtype: of the result.

    Returns:
        ``[…, O, I]``, evaluated where it took more than one step.
    """
    *lead, rows, columns = weight.shape
    out = None
    for experts, band, part in floats(weight, scale, block, dtype):
        if part.shape == (math.prod(lead), rows, columns):
            return part.reshape(*lead, rows, columns)
        if out is None:
            # Writing into one buffer, each step evaluated, keeps one copy: MLX
            # updates a buffer in place while nothing else refers to it.
            out = mx.zeros((math.prod(lead), rows, columns), dtype=part.dtype)
            mx.eval(out)
        out[experts, band] = part
        del part
        mx.eval(out)
    if out is None:
        return mx.zeros(weight.shape, dtype=_DTYPES[dtype])
    return out.reshape(*lead, rows, columns)


def floats(
    weight: mx.array | Stack, scale: mx.array | None, block: tuple[int, int], dtype: str
) -> Iterator[tuple[slice, slice, mx.array]]:
    """Yield the tensor a few experts, or a band of rows, at a time.

    Args:
        weight: ``[…, O, I]``, uint8 with a scale, any float without.
        scale: ``[…, ceil(O/b0), ceil(I/b1)]``, or None where nothing is to be done.
        block: ``(b0, b1)``.
        dtype: what products become; a weight without scale keeps its own.

    Yields:
        Which of the leading axes (flattened), which rows, and ``[n, o, I]``, not
        yet evaluated. Sources that are spent are let go of.
    """
    *lead, rows, columns = weight.shape
    count = math.prod(lead)
    if not isinstance(weight, Stack):
        weight = weight.reshape(count, rows, columns)
    if scale is not None:
        scale = scale.reshape(count, *scale.shape[-2:])

    row_bytes = 4 * max(columns, 1)
    at_once = max(1, TEMPORARY_BYTES // max(rows * row_bytes, 1))
    band = rows
    if rows * row_bytes > TEMPORARY_BYTES:
        band = max(1, TEMPORARY_BYTES // row_bytes // block[0]) * block[0]
    for start in range(0, count, at_once):
        stop = min(start + at_once, count)
        chunk = weight.take(start, stop) if isinstance(weight, Stack) else weight[start:stop]
        for top in range(0, rows, max(band, 1)):
            bottom = min(top + band, rows)
            part = chunk[:, top:bottom]
            if scale is not None:
                grid = scale[start:stop, top // block[0] : -(-bottom // block[0])]
                part = _product(part, grid, block, dtype)
            yield slice(start, stop), slice(top, bottom), part
            del part


def _product(weight: mx.array, scale: mx.array, block: tuple[int, int], dtype: str) -> mx.array:
    """Return ``[N, O, I]`` times ``[N, o, i]``, formed in float32, rounded once."""
    count, rows, columns = weight.shape
    exact = mx.from_fp8(weight, dtype=mx.float32)
    scale = scale.astype(mx.float32)
    if rows % block[0] or columns % block[1]:
        scale = mx.repeat(scale, block[1], axis=2)[:, :, :columns]
        product = exact * mx.repeat(scale, block[0], axis=1)[:, :rows]
    else:
        tiles = exact.reshape(count, rows // block[0], block[0], columns // block[1], block[1])
        product = (tiles * scale[:, :, None, :, None]).reshape(count, rows, columns)
    return product.astype(_DTYPES[dtype])


def quantize(weight: mx.array, block: tuple[int, int]) -> tuple[mx.array, mx.array]:
    """Return E4M3 bytes ``[…, O, I]`` and float32 scales ``[…, o, i]``.

    The inverse of ``dequantize``, up to E4M3's rounding.
    """
    *lead, rows, columns = weight.shape
    padded = mx.pad(
        weight.astype(mx.float32),
        [(0, 0)] * len(lead) + [(0, -rows % block[0]), (0, -columns % block[1])],
    )
    grid = (padded.shape[-2] // block[0], padded.shape[-1] // block[1])
    tiles = padded.reshape(*lead, grid[0], block[0], grid[1], block[1])
    largest = mx.abs(tiles).max(axis=(-3, -1))
    scale = mx.where(largest == 0, 1.0, largest / E4M3_MAX)
    quotient = mx.clip(tiles / scale[..., :, None, :, None], -E4M3_MAX, E4M3_MAX)
    packed = mx.to_fp8(quotient).reshape(padded.shape)
    return packed[..., :rows, :columns], scale
