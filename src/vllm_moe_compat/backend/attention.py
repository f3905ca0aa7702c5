"""Softmax attention over pages.

In: the keys and values of the tokens of one forward pass, ``[B, H, T, D]``, and
who they belong to. They are written to the pages of their requests; out come
all keys and values that each row may see, ``[B, H, L, D]``, and the mask. The
cache object below has the three things that mlx-lm's models ask a cache for
(``offset``, ``make_mask``, ``update_and_fetch``), so the models stay untouched.

A page holds ``[2, H, block, D]``: keys, then values, head-major. One row of D
elements is the unit of writing; a whole run of ``block`` rows, one head's, is
the unit of reading, so a gather of runs needs no transpose.

Padding: block tables are padded with block 0, which stays zero, and padded
queries are never written. A block that this step fills only in part is zeroed
first (see ``batch``), since a mask does not stop NaN: 0 · NaN is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.layers import AttentionLayer
from vllm_moe_compat.backend.page_pool import RAW_DTYPES, PagePool
from vllm_moe_compat.errors import UnsupportedServingError

Int = npt.NDArray[np.int64]


@dataclass
class AttentionStep:
    """What all softmax layers of one forward pass share, built once in numpy.

    ``offsets [B]``: tokens that each row has in its pages already;
    ``lengths [B]``: tokens that it adds now, the rest of T being padding on the
    right; ``tables [B, W]``: its blocks.
    """

    offsets: Int
    lengths: Int
    tables: Int
    block: int
    _rows: dict[int, mx.array] = field(default_factory=dict)
    _runs: dict[int, tuple[mx.array, mx.array]] = field(default_factory=dict)
    _tokens: mx.array | None = None
    _mask: Any = "unset"

    def __post_init__(self) -> None:
        self.width = int(self.lengths.max())
        self.padded = bool((self.lengths != self.width).any())
        self.offset = mx.array(self.offsets.astype(np.int32))
        # A prompt from its first token sees nothing but itself: no read at all.
        self.fresh = not self.offsets.any() and self.width > 1
        self.single = len(self.offsets) == 1
        self.total = int((self.offsets + self.lengths).max())

    @property
    def tokens(self) -> mx.array | None:
        """Indices into the flattened ``[B*T]`` of the tokens that are no padding."""
        if self.padded and self._tokens is None:
            valid = np.arange(self.width) < self.lengths[:, None]
            self._tokens = mx.array(np.flatnonzero(valid).astype(np.uint32))
        return self._tokens

    def rows(self, heads: int) -> mx.array:
        """Rows to write, ``[N, 2, H]`` for the N tokens of this pass."""
        if heads not in self._rows:
            positions = np.concatenate(
                [
                    np.arange(start, start + count)
                    for start, count in zip(self.offsets, self.lengths, strict=True)
                ]
            )
            owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
            blocks = self.tables[owner, positions // self.block]
            planes = blocks[:, None] * (2 * heads) + np.arange(2 * heads)
            rows = planes * self.block + (positions % self.block)[:, None]
            self._rows[heads] = mx.array(rows.reshape(-1, 2, heads).astype(np.uint32))
        return self._rows[heads]

    def runs(self, heads: int) -> tuple[mx.array, mx.array]:
        """Runs to read for keys and for values, ``[B, H, W]`` each."""
        if heads not in self._runs:
            first = self.tables[:, None, :] * (2 * heads)
            keys = (first + np.arange(heads)[:, None]).astype(np.uint32)
            self._runs[heads] = (mx.array(keys), mx.array(keys + np.uint32(heads)))
        return self._runs[heads]

    def mask(self) -> mx.array | str | None:
        """``[B, 1, T, L]`` of bool, or mlx's name for it where one says the same."""
        if isinstance(self._mask, str) and self._mask == "unset":
            if self.fresh or (self.single and self.width > 1):
                self._mask = "causal"
            elif self.single:
                self._mask = None
            else:
                seen = self.offsets[:, None] + np.arange(self.width)
                limit = mx.array(seen[:, None, :, None].astype(np.int32))
                self._mask = mx.arange(self.tables.shape[1] * self.block) <= limit
        mask: mx.array | str | None = self._mask
        return mask


class PagedKV:
    """One softmax layer's cache during one forward pass."""

    def __init__(self, layer: AttentionLayer, pool: PagePool, step: AttentionStep) -> None:
        self.layer, self.pool, self.step = layer, pool, step
        self.offset = step.offset

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask for ``n`` new tokens, in the forms that mlx's attention takes.

        Raises:
            UnsupportedServingError: the model asks for a sliding window.
        """
        if window_size is not None:
            raise UnsupportedServingError(
                f"The embedded MLX backend has no sliding-window attention (window {window_size}, "
                f"layer {self.layer.index}); use mlx-lm's own server for this model."
            )
        return self.step.mask()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write ``[B, H, T, D]`` to the pages; return all that the rows may see.

        Returns keys and values ``[B, H, L, D]`` in the order of the positions.
        """
        step, heads, dim = self.step, self.layer.kv_heads, self.layer.head_dim
        raw = RAW_DTYPES[self.layer.dtype.size]
        both = mx.stack([keys, values], axis=1).astype(self.layer.dtype)  # [B, 2, H, T, D]
        flat = both.transpose(0, 3, 1, 2, 4).reshape(-1, 2, heads, dim)
        if step.tokens is not None:
            flat = flat[step.tokens]
        self.pool.write_rows(step.rows(heads), flat.view(raw))
        if step.fresh:
            return keys, values
        return self._read(step.runs(heads)[0]), self._read(step.runs(heads)[1])

    def _read(self, runs: mx.array) -> mx.array:
        batch, heads, _ = runs.shape
        dim = self.layer.head_dim
        seen = self.pool.read_runs(runs, self.step.block, dim).view(self.layer.dtype)
        seen = seen.reshape(batch, heads, -1, dim)
        # One row needs no mask if it sees exactly its own tokens.
        return seen[:, :, : self.step.total] if self.step.single else seen
