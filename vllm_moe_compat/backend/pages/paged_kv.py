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
the unit of reading, so a gather of runs needs no transpose. Where values have
another size than keys, a page is ``[1, H, block, Dk + Dv]``: beside each other.

Padding: block tables are padded with block 0, which stays zero, and padded
queries are never written. A block that this step fills only in part is zeroed
first (see ``batch``), since a mask does not stop NaN: 0 · NaN is NaN.

Sliding windows: pages that no query of a pass sees are left out of its tables,
and the mask hides what the first page left has too many. Older pages are never
read, so that they may belong to someone else by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.model.layers import AttentionLayer
from vllm_moe_compat.backend.pages import decode_attention as paged_attention
from vllm_moe_compat.backend.pages.page_pool import RAW_DTYPES, PagePool
from vllm_moe_compat.errors import UnsupportedServingError

Int = npt.NDArray[np.int64]


@dataclass
class AttentionStep:
    """What all softmax layers of one forward pass share, built once in numpy.

    ``offsets [B]``: tokens that each row has in its pages already;
    ``lengths [B]``: tokens that it adds now, the rest of T being padding on the
    right; ``tables [B, W]``: its blocks; ``window``: how many tokens each one
    sees, if not all; ``before [B]``: tokens before the first block of the table.
    """

    offsets: Int
    lengths: Int
    tables: Int
    block: int
    window: int | None = None
    before: Int | None = None
    _rows: dict[int, mx.array] = field(default_factory=dict)
    _runs: dict[tuple[int, int], list[mx.array]] = field(default_factory=dict)
    _tiles: dict[int, paged_attention.Tiles] = field(default_factory=dict)
    _row_tables: list[mx.array] = field(default_factory=list)
    _tokens: mx.array | None = None
    _masks: dict[bool, mx.array | str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.width = int(self.lengths.max())
        self.padded = bool((self.lengths != self.width).any())
        self.places = self.offsets if self.before is None else self.offsets + self.before
        self.offset = mx.array(self.places.astype(np.int32))
        # A prompt from its first token sees nothing but itself: no read at all.
        self.fresh = not self.offsets.any() and self.width > 1
        self.single = len(self.offsets) == 1
        self.total = int((self.offsets + self.lengths).max())

    def windowed(self, window: int) -> AttentionStep:
        """The same for layers whose tokens see ``window`` tokens each."""
        if self.total <= window:
            return self
        first = np.maximum(self.offsets - window + 1, 0) // self.block
        need = -(-(self.offsets + self.lengths) // self.block)
        index = first[:, None] + np.arange(int((need - first).max()))
        inside = index < need[:, None]
        tables = np.take_along_axis(self.tables, np.where(inside, index, 0), axis=1)
        before = first * self.block
        offsets, tables = self.offsets - before, np.where(inside, tables, 0)
        return AttentionStep(offsets, self.lengths, tables, self.block, window, before)

    @property
    def tokens(self) -> mx.array | None:
        """Indices into the flattened ``[B*T]`` of the tokens that are no padding."""
        if self.padded and self._tokens is None:
            valid = np.arange(self.width) < self.lengths[:, None]
            self._tokens = mx.array(np.flatnonzero(valid).astype(np.uint32))
        return self._tokens

    def rows(self, count: int) -> mx.array:
        """Rows to write, ``[N, count]`` for the N tokens of this pass, ``count`` each."""
        if count not in self._rows:
            positions = np.concatenate(
                [
                    np.arange(start, start + length)
                    for start, length in zip(self.offsets, self.lengths, strict=True)
                ]
            )
            owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
            blocks = self.tables[owner, positions // self.block]
            planes = blocks[:, None] * count + np.arange(count)
            rows = planes * self.block + (positions % self.block)[:, None]
            self._rows[count] = mx.array(rows.astype(np.uint32))
        return self._rows[count]

    def runs(self, planes: int, heads: int) -> list[mx.array]:
        """Runs to read, ``[B, H, W]`` for each plane."""
        if (planes, heads) not in self._runs:
            first = self.tables[:, None, :] * (planes * heads) + np.arange(heads)[:, None]
            self._runs[planes, heads] = [
                mx.array((first + plane * heads).astype(np.uint32)) for plane in range(planes)
            ]
        return self._runs[planes, heads]

    def tiles(self, heads: int) -> paged_attention.Tiles:
        """The pages of all rows as one list; for passes of one token per row."""
        if heads not in self._tiles:
            self._tiles[heads] = paged_attention.Tiles.build(
                self.offsets, self.tables, self.block, heads, self.window
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
        for runs in self.runs(layer.planes, layer.kv_heads):
            seen = pool.read_runs(runs, self.block, layer.row).view(layer.dtype)
            seen = seen.reshape(len(self.lengths), layer.kv_heads, -1, layer.row)
            # One row needs no mask if it sees exactly its own tokens.
            found.append(seen[:, :, self._first : self.total] if self.single else seen)
        if layer.planes == 1:
            keys, values = mx.split(found[0], [layer.head_dim], axis=-1)
            return keys, values
        return found[0], found[1]

    @property
    def _first(self) -> int:
        """Where a single row's single token begins to see."""
        hidden = self.window is not None and self.width == 1
        return max(0, self.total - (self.window or 0)) if hidden else 0

    def mask(self, as_array: bool = False) -> mx.array | str | None:
        """``[B, 1, T, L]`` of bool, or ``[T, L]`` for one row or prompts from the start.

        Unless ``as_array``, mlx's name for it where one says the same; None where
        nothing is hidden from anyone.
        """
        if as_array not in self._masks:
            self._masks[as_array] = self._mask(as_array)
        return self._masks[as_array]

    def _mask(self, as_array: bool) -> mx.array | str | None:
        if self.single and self.width == 1:
            return None
        seen = self.offsets[:, None] + np.arange(self.width)
        if self.fresh or self.single:
            if self.window is None and not as_array:
                return "causal"
            return self._visible(seen[0], self.width if self.fresh else self.total)
        return self._visible(seen[:, None], self.tables.shape[1] * self.block)

    def _visible(self, seen: Int, length: int) -> mx.array:
        """Which of ``length`` tokens those at ``seen [...]`` see: ``[..., length]``."""
        last = mx.array(seen[..., None].astype(np.int32))
        tokens = mx.arange(length)
        mask = tokens <= last
        return mask if self.window is None else mask & (tokens > last - self.window)


class PagedKV:
    """One softmax layer's cache during one forward pass."""

    # mlx-lm's chunked caches forget what a new chunk does not see; its model masks it too.
    start_position = 0

    def __init__(
        self, layer: AttentionLayer, pool: PagePool, step: AttentionStep, *, asked: bool = False
    ) -> None:
        """``asked``: the layer's attention calls ``attend``."""
        self.layer, self.pool, self.step = layer, pool, step
        # A model that takes one sequence at a time counts with numbers.
        self.offset = int(step.places[0]) if layer.alone else step.offset
        self.on_pages = asked and step.width == 1

    def maybe_trim_front(self) -> None:
        """Part of mlx-lm's chunked cache: pages hold every token."""

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask for ``n`` new tokens, in the forms that mlx's attention takes.

        Raises:
            UnsupportedServingError: the model asks for a window that its own cache has not.
        """
        if window_size not in (None, self.layer.window):
            raise UnsupportedServingError(
                f"The embedded MLX backend cannot serve cache {self.layer.index}: the model asks "
                f"for a window of {window_size} tokens where its own cache keeps "
                f"{self.layer.window or 'all'}; use mlx-lm's own server for this model."
            )
        return None if self.on_pages else self.step.mask(return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write ``[B, H, T, D]`` to the pages; return all that the rows may see.

        Returns keys and values ``[B, H, L, D]`` in the order of the positions.
        """
        step, layer = self.step, self.layer
        # [B, planes, H, T, D]: rows of D, in the order of ``rows``, once T is next to B.
        if layer.planes == 2:
            both = mx.stack([keys, values], axis=1).astype(layer.dtype)
        else:
            both = mx.concatenate([keys, values], axis=-1).astype(layer.dtype)[:, None]
        count = layer.planes * layer.kv_heads
        flat = both.transpose(0, 3, 1, 2, 4).reshape(-1, count, layer.row)
        if step.tokens is not None:
            flat = flat[step.tokens]
        self.pool.write_rows(step.rows(count), flat.view(RAW_DTYPES[layer.dtype.size]))
        if step.fresh or self.on_pages:
            return keys, values
        return step.read(self.pool, layer)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of ``queries [B, Hq, T, D]`` over what ``update_and_fetch`` returned.

        ``sinks [Hq]``: logits of one more key for every head, whose value is zero.
        """
        if self.on_pages:
            return paged_attention.decode(queries, self.pool, self.step, self.layer, scale, sinks)
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
