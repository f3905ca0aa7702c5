"""Multiply FP8 bytes by their scales with lookup tables, on MLX's CPU device.

A byte has 256 values and a block has one scale, so a block has at most 256 different
products, whatever its size. MLX computes and rounds those 256; each weight is then a lookup,
which takes a quarter of the time of converting, multiplying and rounding it. The result is
bit for bit that of MLX's own operations.

Axes: ``N`` experts, ``O`` and ``I`` rows and columns, ``o`` and ``i`` rows and columns of
blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from vllm_moe_compat.execute.laziness import is_lazy

Bits: TypeAlias = "np.ndarray[Any, Any]"

VALUES = 256
_ENTRIES = 2**21
"""Products computed at once; 8 MiB as float32."""
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
_INDICES = 2**17
"""Indices computed at once: few enough to stay in the processor's cache."""


def pays(rows: int, columns: int, block: tuple[int, int]) -> bool:
    """Whether a table is worth making for blocks of ``[rows, columns]``, which reads at once."""
    under = min(block[0], rows) * min(block[1], columns)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return under >= 8 * VALUES and on_cpu and not is_lazy()


def bits(array: mx.array) -> Bits:
    """Return a writable view of an array's memory, as unsigned integers of its item size.

    The array is evaluated first. The view keeps the memory alive. No pending operation of MLX
    may read or write the array meanwhile.
    """
    unsigned = array.view(_UNSIGNED[array.dtype.size])
    # numpy would evaluate it too, but would lose an exception raised while reading a file.
    mx.eval(unsigned)
    return np.array(unsigned, copy=False)


Multiply = Callable[[mx.array, mx.array], mx.array]
"""E4M3 bytes and float32 scales that broadcast with them → rounded products."""


class Tables:
    """The tables of ``N`` experts, computed for a few experts at a time."""

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
        # Offset of each weight's table from the table of the first weight of its band.
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
            # ``_begins`` starts at a block's first row, so only there may rows span blocks.
            rows = self._height if within == 0 else min(self._height, self._block - within)
            here = source[top : top + rows]
            if not (self._one and within + len(here) <= self._block):
                begins, indices = self._begins[: len(here)], self._indices[: len(here)]
                here = np.add(here, begins if within == 0 else begins[0], out=indices)
            # No index is out of range; the other modes would check each one.
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
