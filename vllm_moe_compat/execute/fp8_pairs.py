"""Multiply FP8 bytes by their scales into float32, on MLX's CPU device.

``fp8_tables`` looks up finished products, which takes an index of 8 bytes for each byte. For
targets of 4 bytes less is moved if two bytes at a time are turned into two floats, by a table of
65,536 pairs, and multiplied after that, on a few rows that stay in the processor's cache: half of
the time. The result is bit for bit that of MLX's own operations.

Slots of experts in float32 hold bfloat16 weights, too, which are rounded on the way. Whole tensors
in bfloat16 are made by tables, which are as fast there; a single expert is too small for them.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from vllm_moe_compat.execute.fp8_tables import VALUES, Bits

_AT_ONCE = 2**16
"""Values computed at once: few enough to stay in the processor's cache."""
_NAN = 0x7FC00000
"""The NaN that MLX rounds every NaN to in bfloat16, as float32."""


@cache
def _values() -> Bits:
    """Return MLX's value of each byte, float32 ``[256]``."""
    return np.array(mx.from_fp8(mx.arange(VALUES).astype(mx.uint8), dtype=mx.float32))


@cache
def _pairs() -> Bits:
    """Return the values of two bytes as one item: ``[65536]``, each of two float32."""
    pairs = np.empty((VALUES, VALUES, 2), np.float32)
    pairs[..., 0], pairs[..., 1] = _values(), _values()[:, None]  # the first byte is the low one
    return pairs.reshape(-1).view(np.float64)


def prepare() -> None:
    """Make the table, by MLX; from then on any thread may write."""
    _pairs()


def scales(stored: Bits, kind: str) -> Bits:
    """Return scales as float32, like ``numbers.fp8.scales_as_floats``.

    Args:
        stored: their bytes, uint8.
        kind: their dtype (safetensors' name); bytes are exponents.
    """
    if kind == "F32":
        return stored.view(np.float32)
    if kind == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == "F16":
        return stored.view(np.float16).astype(np.float32)
    exponent = np.where(stored == 0, 1 << 22, stored.astype(np.uint32) << 23).astype(np.uint32)
    return np.where(stored == 255, np.float32("nan"), exponent.view(np.float32))


class Pairs:
    """Writes the products of ``N`` experts, some rows at a time."""

    def __init__(
        self, scale: Bits, block: tuple[int, int], columns: int, *, rounded: bool = False
    ) -> None:
        """Take the scales.

        Args:
            scale: float32 ``[N, o, i]``.
            block: rows and columns under one scale.
            columns: ``I``.
            rounded: whether products are rounded to bfloat16.
        """
        self._scale, self._block, self._columns, self._rounded = scale, block, columns, rounded
        self._height = max(1, _AT_ONCE // columns)
        self._finite = not rounded or bool(np.isfinite(scale).all())
        # One memory for all rows: a new one for each would be more work than the arithmetic.
        self._scratch = np.empty((2, self._height if rounded else 0, columns), np.uint32)
        self._factors: tuple[int, int, Bits] | None = None

    def write(self, expert: int, first: int, source: Bits, target: Bits) -> None:
        """Write the products of bytes ``[r, I]``, an expert's rows from ``first`` on.

        Args:
            expert: its number.
            first: its row that ``source`` begins with.
            source: bytes, uint8 ``[r, I]``.
            target: float32 as uint32 ``[r, I]``, contiguous; or bfloat16 as uint16, if products
                are rounded.
        """
        with np.errstate(all="ignore"):  # Bytes may stand for NaN, and products overflow.
            for top in range(0, len(source), self._height):
                here = source[top : top + self._height]
                into = target[top : top + len(here)]
                words = into if into.itemsize == 4 else self._scratch[0, : len(into)]
                exact = words.view(np.float32)
                _decode(here, exact)
                exact *= self._of(expert, first + top, len(here))
                if self._rounded:
                    special = not self._finite or _has_nan(here)
                    _round(words, exact, self._scratch[1, : len(into)], special=special)
                if words is not into:
                    np.right_shift(words, 16, out=into, casting="unsafe")

    def _of(self, expert: int, first: int, rows: int) -> Bits:
        """Return what ``rows`` rows are multiplied by; its shape broadcasts to ``[rows, I]``."""
        height, width = self._block
        begin, end = first // height, (first + rows - 1) // height
        if begin == end and self._factors is not None and self._factors[:2] == (expert, begin):
            return self._factors[2]
        factors = self._scale[expert, begin : end + 1]
        if factors.shape[1] > 1:
            factors = np.repeat(factors, width, axis=1)[:, : self._columns]
        if begin == end:
            self._factors = expert, begin, factors
            return factors
        found: Bits = factors[np.arange(first, first + rows) // height - begin]
        return found


def _has_nan(source: Bits) -> bool:
    """Whether a byte stands for NaN: 0x7F or 0xFF."""
    return bool((source & 0x7F).max(initial=0) == 0x7F)


def _decode(source: Bits, target: Bits) -> None:
    """Write the float32 values of bytes ``[r, I]``, both contiguous."""
    # No index is out of range; the other modes would check each one.
    if source.size % 2 or target.ctypes.data % 8:
        np.take(_values(), source, out=target, mode="wrap")
        return
    pairs = source.reshape(-1).view(np.uint16)
    np.take(_pairs(), pairs, out=target.reshape(-1).view(np.float64), mode="wrap")


def _round(words: Bits, exact: Bits, odd: Bits, *, special: bool) -> None:
    """Round float32 to bfloat16 in place: to the nearest, ties to even.

    Args:
        words: the bits.
        exact: the same memory as float32.
        odd: memory of the same shape to work in.
        special: whether there may be NaN.
    """
    nan = np.isnan(exact) if special else None
    # Up to half of the last bit that stays is added, so what is above it carries over.
    np.right_shift(words, 16, out=odd)
    odd &= 1
    odd += 0x7FFF
    words += odd
    words &= 0xFFFF0000
    if nan is not None:
        words[nan] = _NAN
