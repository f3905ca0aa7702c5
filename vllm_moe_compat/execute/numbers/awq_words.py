"""Bring AWQ's words into MLX's order, without unpacking them.

AWQ packs 8 rows of one column into a word, MLX 8 columns of one row. So 8 words of AWQ, those of
8 columns, hold the same square of 8x8 nibbles as 8 words of MLX, transposed. A square is transposed
by exchanging halves, then bytes, then nibbles of pairs of words: 18 operations on words, where
unpacking takes 8 times as many numbers. On MLX's CPU device numpy does it in pieces that fit
into the processor's cache, in half the time of MLX's operations.

Axes: ``n`` experts, ``I`` columns, ``c`` words of 8 rows.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vllm_moe_compat.execute import fp8_tables
from vllm_moe_compat.execute.laziness import is_lazy

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Row within a word of AWQ → the nibble that holds it."""
_STEPS = ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F))
"""Distance of the exchanged words, and the bits that stay in the first."""
_PIECE = 2**17
"""Words of a piece: eight arrays of 64 KiB."""


def in_mlx_order(words: mx.array) -> mx.array:
    """Return MLX's words ``uint32 [n, 8·c, I/8]`` of AWQ's ``uint32 [n, I, c]``."""
    count, columns, width = words.shape
    if mx.default_device().type == mx.DeviceType.cpu and not is_lazy():
        made = mx.zeros((count, 8 * width, columns // 8), dtype=mx.uint32)
        _write(fp8_tables.bits(words), fp8_tables.bits(made).reshape(count, width, 8, -1))
        return made
    square = words.reshape(count, columns // 8, 8, width)
    rows = [square[:, :, n] for n in range(8)]
    for distance, mask in _STEPS:
        shift = 4 * distance
        for first in (n for n in range(8) if not n & distance):
            low, high = rows[first], rows[first + distance]
            rows[first] = (low & mask) | ((high & mask) << shift)
            rows[first + distance] = ((low >> shift) & mask) | (high & (mask ^ 0xFFFFFFFF))
    ordered = mx.stack([rows[nibble] for nibble in NIBBLES], axis=-1)
    return mx.contiguous(ordered.transpose(0, 2, 3, 1)).reshape(count, 8 * width, columns // 8)


def _write(words: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> None:
    """Write the words of ``[n, I, c]`` into ``[n, c, 8, I/8]``."""
    count, columns, width = words.shape
    height = max(1, _PIECE // 8 // width)
    for expert in range(count):
        squares = words[expert].reshape(columns // 8, 8, width)
        for start in range(0, columns // 8, height):
            piece = slice(start, start + height)
            rows = [np.array(squares[piece, n], order="C") for n in range(8)]
            for distance, mask in _STEPS:
                shift, kept = np.uint32(4 * distance), np.uint32(mask)
                for first in (n for n in range(8) if not n & distance):
                    low, high = rows[first], rows[first + distance]
                    changed = ((low >> shift) ^ high) & kept
                    high ^= changed
                    changed <<= shift
                    low ^= changed
            for row, nibble in enumerate(NIBBLES):
                target[expert, :, row, piece] = rows[nibble].T
