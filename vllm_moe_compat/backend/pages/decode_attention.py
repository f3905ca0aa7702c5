"""Decode attention over pages: one query token per row, and the choice how to read.

In: queries ``[B, Hq, 1, D]``, a pool whose newest keys and values are written, and
the step's tables. Out: ``[B, Hq, 1, D]``. ``decode`` is the door: a fused kernel
takes its place here, and nowhere else; ``gather`` is the plain-operation oracle
that everything behind the door has to agree with.

Which path, by shape. Figures are times relative to mlx's attention over one
contiguous padded cache of the same contents (8 query and 2 KV heads of 128, blocks
of 80), measured on MLX's CPU build; "ragged" is contexts of 1, 1/2, 1/4 and 1/16
(1/8 at 16 x 1024) of the longest.

=================  =========================  ===================
batch x context    float32                    bfloat16
=================  =========================  ===================
..                 pool   request   gather    request   gather
1 x 1024           1.08   1.09      1.05      1.42      1.06
4 x 1024           1.06   1.23      1.19      1.14      1.24
4 x 4096           1.07   1.2-1.8   1.2-1.7   1.10      1.10
4 x 4096 ragged    0.50   0.57      1.22      0.50      1.11
16 x 256           1.30   1.41      1.49      1.20      1.32
16 x 1024          1.07   1.30      1.24      1.11      1.07
16 x 1024 ragged   0.55   0.62      1.21      0.55      1.08
=================  =========================  ===================

* **on pool**: matrix products whose right-hand sides are the pages themselves,
  found by index; nothing is copied, and only pages that hold tokens are touched.
  Each page's softmax is taken by itself and the pages of a row are joined
  afterwards. Used on the CPU in float32, the only dtype of its ``gather_mm``.
* **per request**: each row's pages are gathered and attended to by themselves,
  without padding or mask. Used elsewhere when padding would be half of the work
  or more, and there is enough of it to pay for a call per row.
* **gather**: one gather of all rows, padded, and mlx's fused attention. Used
  otherwise. On Metal and CUDA the rule has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.model.layers import AttentionLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool

if TYPE_CHECKING:
    from vllm_moe_compat.backend.pages.paged_kv import AttentionStep

# Per request: padded over real tokens, and tokens of padding that a call per row is worth.
WASTE_FACTOR = 2.0
WASTE_TOKENS_PER_ROW = 128


def path(step: AttentionStep, dtype: mx.Dtype) -> str:
    """``on_pool``, ``per_request`` or ``gather``: the one place that chooses."""
    if dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu:
        return "on_pool"
    rows, width = step.tables.shape
    padded, real = rows * width * step.block, int(step.offsets.sum()) + rows
    if padded >= WASTE_FACTOR * real and padded - real >= WASTE_TOKENS_PER_ROW * rows:
        return "per_request"
    return "gather"


def decode(
    queries: mx.array,
    pool: PagePool,
    step: AttentionStep,
    layer: AttentionLayer,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attend from ``[B, Hq, 1, D]`` to all tokens that each row sees, the new one included.

    ``sinks [Hq]``: logits of one more key for every head, whose value is zero.
    """
    chosen = PATHS[path(step, layer.dtype)]
    out: mx.array = chosen(queries, pool, step, layer, scale, sinks)
    return out


def gather(
    queries: mx.array,
    pool: PagePool,
    step: AttentionStep,
    layer: AttentionLayer,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """One padded copy of everybody's keys and values."""
    keys, values = step.read(pool, layer)
    return mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=scale, mask=step.mask(), sinks=sinks
    )


def per_request(
    queries: mx.array,
    pool: PagePool,
    step: AttentionStep,
    layer: AttentionLayer,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """A copy of each row's own keys and values, one row after the other."""
    heads, dim = layer.kv_heads, layer.head_dim
    pages = _runs(pool, step.block, layer)
    first = mx.arange(heads, dtype=mx.uint32)[:, None]
    out = []
    for row, table in enumerate(step.row_tables()):
        runs = table * (2 * heads) + first
        end = int(step.offsets[row]) + 1
        first_seen = max(0, end - step.window) if step.window else 0
        keys, values = (
            pages[at].reshape(1, heads, -1, dim)[:, :, first_seen:end]
            for at in (runs, runs + heads)
        )
        query = queries[row : row + 1]
        out.append(
            mx.fast.scaled_dot_product_attention(query, keys, values, scale=scale, sinks=sinks)
        )
    return mx.concatenate(out)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The pages of all rows in one list of P, for one number of KV heads.

    ``queries [P, H]``: row of each tile's queries in ``[B*H, …]``; ``keys`` and
    ``values [P, H]``: runs of the pool; ``here [P, H]``: the tile itself;
    ``hidden [P, 1, 1, block]``: 0, or -inf for positions that hold no token yet,
    or one outside the window;
    ``join [B, W]``: the tiles of each row, None if every row has as many;
    ``void [B, W, 1, 1, 1]``: 0, or -inf where ``join`` is padding.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    here: mx.array
    hidden: mx.array
    join: mx.array | None
    void: mx.array | None

    @classmethod
    def build(
        cls,
        offsets: npt.NDArray[np.int64],
        tables: npt.NDArray[np.int64],
        block: int,
        heads: int,
        window: int | None = None,
    ) -> Tiles:
        """List the pages that hold tokens ``0 … offsets[i]`` of each row ``i``.

        With a ``window``, every page holds one inside it.
        """
        width = tables.shape[1]
        need = offsets // block + 1
        real = np.arange(width) < need[:, None]
        owner, place = np.nonzero(real)
        head = np.arange(heads)
        keys = tables[real][:, None] * (2 * heads) + head
        left = (offsets[owner] - place * block)[:, None]
        shown = np.arange(block) <= left
        if window is not None:
            shown &= np.arange(block) > left - window
        hidden = np.where(shown, 0.0, -np.inf).astype(np.float32)
        join = void = None
        if not real.all():
            # Padded with a tile of the row's own: whatever it holds concerns no one else.
            ends = np.cumsum(need)
            index = np.where(real, (ends - need)[:, None] + np.arange(width), (ends - 1)[:, None])
            join = mx.array(index.astype(np.uint32))
            void = mx.array(np.where(real, 0.0, -np.inf).astype(np.float32)[..., None, None, None])
        return cls(
            mx.array((owner[:, None] * heads + head).astype(np.uint32)),
            mx.array(keys.astype(np.uint32)),
            mx.array((keys + heads).astype(np.uint32)),
            mx.arange(len(owner) * heads, dtype=mx.uint32).reshape(-1, heads),
            mx.array(hidden[:, None, None]),
            join,
            void,
        )


def on_pool(
    queries: mx.array,
    pool: PagePool,
    step: AttentionStep,
    layer: AttentionLayer,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Products with the pages where they are; G query heads share a KV head."""
    batch, query_heads, _, dim = queries.shape
    heads = layer.kv_heads
    tiles = step.tiles(heads)
    pages = _runs(pool, step.block, layer)
    shared = (queries * scale).reshape(batch * heads, query_heads // heads, dim)
    scores = mx.gather_mm(shared, pages.swapaxes(-1, -2), tiles.queries, tiles.keys)
    scores = scores + tiles.hidden  # [P, H, G, block]
    top = scores.max(axis=-1, keepdims=True)
    weights = mx.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    flat = weights.reshape(-1, query_heads // heads, step.block)
    seen = mx.gather_mm(flat, pages, tiles.here, tiles.values)  # [P, H, G, D]
    if tiles.join is None or tiles.void is None:
        top, total, seen = (x.reshape(batch, -1, *x.shape[1:]) for x in (top, total, seen))
    else:
        top, total, seen = (x[tiles.join] for x in (top, total, seen))
        top = top + tiles.void  # [B, W, H, G, 1]
    highest = top.max(axis=1, keepdims=True)
    if sinks is not None:
        sink = sinks.reshape(heads, -1, 1)
        highest = mx.maximum(highest, sink)
    share = mx.exp(top - highest)
    weight = (share * total).sum(axis=1)
    if sinks is not None:
        weight = weight + mx.exp(sink - highest[:, 0])
    out = (share * seen).sum(axis=1) / weight
    return out.reshape(batch, query_heads, 1, dim)


def _runs(pool: PagePool, block: int, layer: AttentionLayer) -> mx.array:
    """The pool as runs ``[-1, block, D]`` of the layer's dtype; no copy."""
    return pool.pages.view(layer.dtype).reshape(-1, block, layer.head_dim)


PATHS = {"on_pool": on_pool, "per_request": per_request, "gather": gather}
