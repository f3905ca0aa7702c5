"""Block tables, row indices and masks that the softmax layers of one forward pass share.

They are built once per pass in numpy and converted to MLX arrays on first use, since every layer
of a group needs the same ones.

Padding. Block tables are padded with block 0, which stays zero, and padded queries are never
written. A block that a step fills only in part is zeroed beforehand (``Batch.partial_blocks``),
since a mask does not stop NaN: 0 · NaN is NaN.

Sliding windows. Pages outside the window of every query of a pass are left out of the tables,
and the mask hides the surplus tokens of the first page kept. Pages before the window are never
read, so vLLM may have given them to another request.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tiles:
    """The P pages of all rows in one list, for H KV heads.

    A tile is one page of one row. Passes of one token per row compute attention per tile and
    then combine the tiles of each row.

    Attributes:
        queries: ``[P, H]``, index of each tile's queries in ``[B*H, …]``.
        keys: ``[P, H]``, runs of the pool that hold the keys.
        values: ``[P, H]``, runs of the pool that hold the values.
        own: ``[P, H]``, index of the tile itself in ``[P*H, …]``.
        bias: ``[P, 1, 1, block]`` float32: 0, or -inf for positions without a token or outside
            the window.
        by_row: ``[B, W]``, the tiles of each row; None if every row has equally many.
        row_bias: ``[B, W, 1, 1, 1]`` float32: 0, or -inf where ``by_row`` is padding.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    own: mx.array
    bias: mx.array
    by_row: mx.array | None
    row_bias: mx.array | None

    @classmethod
    def build(
        cls, offsets: Int, tables: Int, block: int, heads: int, window: int | None = None
    ) -> Tiles:
        """List the pages that hold tokens ``0 … offsets[i]`` of each row ``i``.

        With a ``window``, ``tables`` must start at the first page inside it.
        """
        width = tables.shape[1]
        need = offsets // block + 1
        real = np.arange(width) < need[:, None]
        row, page = np.nonzero(real)
        head = np.arange(heads)
        keys = tables[real][:, None] * (2 * heads) + head
        last = (offsets[row] - page * block)[:, None]
        visible = np.arange(block) <= last
        if window is not None:
            visible &= np.arange(block) > last - window
        bias = np.where(visible, 0.0, -np.inf).astype(np.float32)
        by_row = row_bias = None
        if not real.all():
            # Pad with a tile of the same row, so that NaN in it affects no other request.
            ends = np.cumsum(need)
            index = np.where(real, (ends - need)[:, None] + np.arange(width), (ends - 1)[:, None])
            by_row = mx.array(index.astype(np.uint32))
            padding = np.where(real, 0.0, -np.inf).astype(np.float32)
            row_bias = mx.array(padding[..., None, None, None])
        return cls(
            mx.array((row[:, None] * heads + head).astype(np.uint32)),
            mx.array(keys.astype(np.uint32)),
            mx.array((keys + heads).astype(np.uint32)),
            mx.arange(len(row) * heads, dtype=mx.uint32).reshape(-1, heads),
            mx.array(bias[:, None, None]),
            by_row,
            row_bias,
        )


@dataclass
class AttentionMetadata:
    """Metadata of one forward pass for the softmax layers of one KV group and window.

    Attributes:
        offsets: ``[B]``, tokens of each row that its table holds already.
        lengths: ``[B]``, tokens that each row adds; the rest of T is padding on the right.
        tables: ``[B, W]``, blocks of each row, padded with block 0.
        block: tokens per block.
        window: sliding window in tokens; None if every earlier token is visible.
        before: ``[B]``, tokens in front of the first block of the table; None means 0.
        verifies: tokens after a row's first are drafts, which may be discarded.
        by_token: of the same tokens as ``B*T`` rows of one token each, in a pass whose tokens
            attend one by one; else None.
    """

    offsets: Int
    lengths: Int
    tables: Int
    block: int
    window: int | None = None
    before: Int | None = None
    verifies: bool = False
    by_token: AttentionMetadata | None = None
    _single: list[AttentionMetadata] = field(default_factory=list)
    _rows: dict[int, mx.array] = field(default_factory=dict)
    _runs: dict[tuple[int, int], list[mx.array]] = field(default_factory=dict)
    _tiles: dict[int, Tiles] = field(default_factory=dict)
    _row_tables: list[mx.array] = field(default_factory=list)
    _tokens: mx.array | None = None
    _masks: dict[bool, mx.array | str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.width = int(self.lengths.max())
        self.padded = bool((self.lengths != self.width).any())
        self.positions = self.offsets if self.before is None else self.offsets + self.before
        self.offset = mx.array(self.positions.astype(np.int32))
        # A prompt computed from its first token attends only to itself: nothing to read.
        self.from_start = not self.offsets.any() and self.width > 1 and not self.verifies
        self.single = len(self.offsets) == 1
        self.total = int((self.offsets + self.lengths).max())

    def with_window(self, window: int) -> AttentionMetadata:
        """Return the metadata for layers with a sliding window of ``window`` tokens."""
        if self.total <= window:
            return self
        first = np.maximum(self.offsets - window + 1, 0) // self.block
        need = -(-(self.offsets + self.lengths) // self.block)
        index = first[:, None] + np.arange(int((need - first).max()))
        inside = index < need[:, None]
        tables = np.take_along_axis(self.tables, np.where(inside, index, 0), axis=1)
        before = first * self.block
        offsets, tables = self.offsets - before, np.where(inside, tables, 0)
        by_token = None if self.by_token is None else self.by_token.with_window(window)
        return AttentionMetadata(
            offsets, self.lengths, tables, self.block, window, before, self.verifies, by_token
        )

    def attending_by_token(self) -> AttentionMetadata:
        """Return this metadata for a pass whose tokens attend as in passes of one token."""
        return replace(self, by_token=self.single_tokens())

    def single_tokens(self) -> AttentionMetadata:
        """Return the metadata of the tokens as ``B*T`` rows of one token each; without a window.

        Padding attends like the last token of its row.
        """
        if not self._single:
            step = np.minimum(np.arange(self.width), self.lengths[:, None] - 1)
            offsets = (self.offsets[:, None] + step).reshape(-1)
            tables = np.repeat(self.tables, self.width, axis=0)
            need = int((offsets // self.block).max()) + 1
            ones = np.ones_like(offsets)
            self._single.append(AttentionMetadata(offsets, ones, tables[:, :need], self.block))
        return self._single[0]

    @property
    def tokens(self) -> mx.array | None:
        """Indices into ``[B*T]`` of the tokens that are not padding; None if all are."""
        if self.padded and self._tokens is None:
            valid = np.arange(self.width) < self.lengths[:, None]
            self._tokens = mx.array(np.flatnonzero(valid).astype(np.uint32))
        return self._tokens

    def rows(self, count: int) -> mx.array:
        """Return the pool rows to write, ``[N, count]``: ``count`` for each of N new tokens."""
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
        """Return the pool runs to read, ``[B, H, W]`` for each plane."""
        if (planes, heads) not in self._runs:
            first = self.tables[:, None, :] * (planes * heads) + np.arange(heads)[:, None]
            self._runs[planes, heads] = [
                mx.array((first + plane * heads).astype(np.uint32)) for plane in range(planes)
            ]
        return self._runs[planes, heads]

    def tiles(self, heads: int) -> Tiles:
        """Return the pages of all rows as one list; only for passes of one token per row."""
        if heads not in self._tiles:
            self._tiles[heads] = Tiles.build(
                self.offsets, self.tables, self.block, heads, self.window
            )
        return self._tiles[heads]

    def row_tables(self) -> list[mx.array]:
        """Return the blocks of each row without padding."""
        if not self._row_tables:
            need = -(-(self.offsets + self.lengths) // self.block)
            self._row_tables = [
                mx.array(table[:count].astype(np.uint32))
                for table, count in zip(self.tables, need, strict=True)
            ]
        return self._row_tables

    def read(self, pool: PagePool, layer: AttentionLayer) -> tuple[mx.array, mx.array]:
        """Copy the keys and values visible to the rows out of the pool, ``[B, H, L, D]`` each."""
        found = []
        for runs in self.runs(layer.planes, layer.kv_heads):
            part = pool.read_runs(runs, self.block, layer.row).view(layer.dtype)
            part = part.reshape(len(self.lengths), layer.kv_heads, -1, layer.row)
            # A single row needs no mask once it is cut to exactly its own tokens.
            found.append(part[:, :, self._first_visible : self.total] if self.single else part)
        if layer.planes == 1:
            keys, values = mx.split(found[0], [layer.head_dim], axis=-1)
            return keys, values
        return found[0], found[1]

    @property
    def _first_visible(self) -> int:
        """First token visible to the single token of a single row, counted in its table."""
        windowed = self.window is not None and self.width == 1
        return max(0, self.total - (self.window or 0)) if windowed else 0

    def mask(self, as_array: bool = False) -> mx.array | str | None:
        """Return the mask: ``[B, 1, T, L]`` bool, or ``[T, L]`` if all rows share one.

        ``"causal"`` is returned where it is equivalent, unless ``as_array``; None where nothing
        is hidden.
        """
        if as_array not in self._masks:
            self._masks[as_array] = self._build_mask(as_array)
        return self._masks[as_array]

    def _build_mask(self, as_array: bool) -> mx.array | str | None:
        if self.single and self.width == 1:
            return None
        positions = self.offsets[:, None] + np.arange(self.width)
        if self.from_start or self.single:
            if self.window is None and not as_array:
                return "causal"
            return self._visible(positions[0], self.width if self.from_start else self.total)
        return self._visible(positions[:, None], self.tables.shape[1] * self.block)

    def _visible(self, positions: Int, length: int) -> mx.array:
        """Return which of ``length`` tokens are visible from ``positions [...]``: ``[..., L]``."""
        last = mx.array(positions[..., None].astype(np.int32))
        tokens = mx.arange(length)
        mask = tokens <= last
        return mask if self.window is None else mask & (tokens > last - self.window)
