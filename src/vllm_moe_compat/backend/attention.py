"""Softmax attention over pages.

In: the keys and values of the tokens of one forward pass, ``[B, H, T, D]``, and
who they belong to. They are written to the pages of their requests; out come
all keys and values that each row may see, ``[B, H, L, D]``, and the mask. The
cache object below has the three things that mlx-lm's models ask a cache for
(``offset``, ``make_mask``, ``update_and_fetch``), so the models stay untouched.
Where a model's attention asks its cache (``attention_hook``), a pass of one token
per row is attended to by ``paged_attention`` instead, which chooses how to read.

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

from vllm_moe_compat.backend import paged_attention
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
    _tiles: dict[int, paged_attention.Tiles] = field(default_factory=dict)
    _row_tables: list[mx.array] = field(default_factory=list)
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

    def tiles(self, heads: int) -> paged_attention.Tiles:
        """The pages of all rows as one list; for passes of one token per row."""
        if heads not in self._tiles:
            self._tiles[heads] = paged_attention.Tiles.build(
                self.offsets, self.tables, self.block, heads
            )
        return self._tiles[heads]

    def row_tables(self) -> list[mx.array]:
        """The blocks of each row, without padding."""
        if not self._row_tables:
            need = -(-(self.offsets + self.lengths) // self.block)
            self._row_tables = [
                mx.array(table[:count].astype(np.uint32))
                for table, count in zip(self.tables, need, strict=True)
            ]
        return self._row_tables

    def read(self, pool: PagePool, layer: AttentionLayer) -> tuple[mx.array, mx.array]:
        """Copies of all keys and all values that the rows may see, ``[B, H, L, D]`` each."""
        found = []
        for runs in self.runs(layer.kv_heads):
            seen = pool.read_runs(runs, self.block, layer.head_dim).view(layer.dtype)
            seen = seen.reshape(len(self.lengths), layer.kv_heads, -1, layer.head_dim)
            # One row needs no mask if it sees exactly its own tokens.
            found.append(seen[:, :, : self.total] if self.single else seen)
        return found[0], found[1]

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

    def __init__(
        self, layer: AttentionLayer, pool: PagePool, step: AttentionStep, *, asked: bool = False
    ) -> None:
        """``asked``: the layer's attention calls ``attend``."""
        self.layer, self.pool, self.step = layer, pool, step
        self.offset = step.offset
        self.on_pages = asked and step.width == 1

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
        return None if self.on_pages else self.step.mask()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write ``[B, H, T, D]`` to the pages; return all that the rows may see.

        Returns keys and values ``[B, H, L, D]`` in the order of the positions.
        """
        step, heads, dim = self.step, self.layer.kv_heads, self.layer.head_dim
        dtype = self.layer.dtype
        # [B, 2, H, T, D]: rows of D, in the order of ``rows``, once T is next to B.
        both = mx.stack([keys, values], axis=1).astype(dtype)
        flat = both.transpose(0, 3, 1, 2, 4).reshape(-1, 2, heads, dim)
        if step.tokens is not None:
            flat = flat[step.tokens]
        self.pool.write_rows(step.rows(heads), flat.view(RAW_DTYPES[dtype.size]))
        if step.fresh or self.on_pages:
            return keys, values
        return step.read(self.pool, self.layer)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None,
    ) -> mx.array:
        """Attention of ``queries [B, Hq, T, D]`` over what ``update_and_fetch`` returned."""
        if self.on_pages:
            return paged_attention.decode(queries, self.pool, self.step, self.layer, scale)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
