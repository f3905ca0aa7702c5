"""FP8 bytes times their scales, by table, on MLX's CPU device.

A byte has 256 values and a block one scale, so a block has no more than 256 different
products, however many weights it holds. MLX forms and rounds those; each weight is then
looked up, which takes a quarter of the time of converting, multiplying and rounding it.
The result is the same bit for bit, since it is MLX's own.

Axes: ``N`` experts, ``O`` and ``I`` rows and columns, ``o`` and ``i`` those of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

Bits: TypeAlias = "np.ndarray[Any, Any]"

VALUES = 256
_ENTRIES = 2**21
"""How many products are made at once; as float32 they take 8 MiB."""
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
_INDICES = 2**17
"""How many indices are computed at once: they should stay in the processor's cache."""


def pays(rows: int, columns: int, block: tuple[int, int]) -> bool:
    """Whether a table is worth making for blocks of ``[rows, columns]``."""
    under = min(block[0], rows) * min(block[1], columns)
    return under >= 8 * VALUES and mx.default_device().type == mx.DeviceType.cpu


def bits(array: mx.array) -> Bits:
    """Return the memory of an array as unsigned integers of its item size, to be written.

    The array is evaluated first. While the view lives, so does the memory; nothing of
    MLX's may be under way that reads or writes it.
    """
    unsigned = array.view(_UNSIGNED[array.dtype.size])
    # numpy would evaluate it as well, but not raise what reading a file raised.
    mx.eval(unsigned)
    return np.array(unsigned, copy=False)


Multiply = Callable[[mx.array, mx.array], mx.array]
"""E4M3 bytes and float32 scales that broadcast → rounded products."""


class Tables:
    """The tables of ``N`` experts, made for a few of them at a time."""

    def __init__(
        self, scale: mx.array, block: tuple[int, int], columns: int, multiply: Multiply
    ) -> None:
        """Take scales, float32 ``[N, o, i]``, of blocks of ``block`` rows and columns."""
        self._scale, self._block, self._multiply = scale, block[0], multiply
        _, down, across = scale.shape
        self._at_once = max(1, _ENTRIES // (down * across * VALUES))
        self._first, self._made = 0, np.empty(0)
        fitting = max(1, _INDICES // columns)
        self._height = fitting if fitting < block[0] else fitting // block[0] * block[0]
        # Where each weight's table begins, counted from that of the first one of its band.
        rows = np.arange(self._height) // block[0] * across
        self._begins = (rows[:, None] + np.arange(columns) // block[1]) * VALUES
        self._indices = np.empty_like(self._begins)
        self._one = across == 1

    def write(self, expert: int, first: int, source: Bits, target: Bits) -> None:
        """Write the products of bytes ``[r, I]``, an expert's rows from ``first`` on."""
        table = self._of(expert)
        top = 0
        while top < len(source):
            block, within = divmod(first + top, self._block)
            # Several blocks' rows only from the beginning of one, as ``_begins`` has them.
            rows = self._height if within == 0 else min(self._height, self._block - within)
            here = source[top : top + rows]
            if not (self._one and within + len(here) <= self._block):
                begins, indices = self._begins[: len(here)], self._indices[: len(here)]
                here = np.add(here, begins if within == 0 else begins[0], out=indices)
            # No index is out of range; other modes would check each.
            np.take(table[block:], here, out=target[top : top + rows], mode="wrap")
            top += rows

    def _of(self, expert: int) -> Bits:
        """Return the tables of one expert, ``[o, i, 256]``."""
        if not self._first <= expert < self._first + len(self._made):
            scale = self._scale[expert : expert + self._at_once]
            made = self._multiply(mx.arange(VALUES).astype(mx.uint8), scale[..., None])
            self._first, self._made = expert, bits(made)
        found: Bits = self._made[expert - self._first]
        return found


def product(
    weight: mx.array, scale: mx.array, block: tuple[int, int], multiply: Multiply, dtype: mx.Dtype
) -> mx.array:
    """Return what ``multiply`` would make of all the weights, evaluated.

    Args:
        weight: E4M3 bytes, uint8 ``[N, O, I]``.
        scale: float32 ``[N, o, i]``.
        block: rows and columns under one scale.
        multiply: forms the products.
        dtype: theirs.

    Returns:
        ``[N, O, I]``.
    """
    tables = Tables(scale, block, weight.shape[-1], multiply)
    out = mx.zeros(weight.shape, dtype=dtype)
    source, target = bits(weight), bits(out)
    for expert in range(len(source)):
        tables.write(expert, 0, source[expert], target[expert])
    return out
