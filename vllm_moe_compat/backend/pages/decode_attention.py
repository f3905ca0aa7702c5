"""Attention of one new token per row over the pages of its request.

``decode`` takes queries ``[B, Hq, 1, D]``, a pool that already holds the new keys and values, and
the metadata of the pass; it returns ``[B, Hq, 1, D]``. A fused kernel would replace ``decode``
and nothing else. ``gather`` uses plain operations only and is the reference for the other paths.

``choose_path`` selects the path by shape. The figures are times relative to mlx's attention over
one contiguous padded cache of the same contents (8 query heads, 2 KV heads of 128, blocks of 80),
measured on MLX's CPU build; "ragged" means contexts of 1, 1/2, 1/4 and 1/16 (1/8 at 16 x 1024) of
the longest one.

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

* **on_pool**: matrix products with the pages in place, selected by index; nothing is copied, and
  only pages that hold tokens are read. Softmax is computed per page and the pages of a row are
  combined afterwards. Used on the CPU in float32, the only dtype of its ``gather_mm``.
* **per_request**: the pages of each row are gathered and attended to separately, without padding
  or mask. Used elsewhere if at least half of the work would be padding and there is enough of it
  to outweigh one call per row.
* **gather**: one padded gather of all rows and mlx's fused attention. Used otherwise. The rule has
  not been measured on Metal and CUDA.
"""

from __future__ import annotations

import mlx.core as mx

from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool

# ``per_request`` needs this ratio of padded to real tokens, and this much padding per row.
WASTE_FACTOR = 2.0
WASTE_TOKENS_PER_ROW = 128


def computes_on_pool(dtype: mx.Dtype) -> bool:
    """Return whether ``on_pool`` is chosen for every pass of this dtype."""
    return bool(dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu)


def choose_path(metadata: AttentionMetadata, dtype: mx.Dtype) -> str:
    """Return ``on_pool``, ``per_request`` or ``gather``."""
    if computes_on_pool(dtype):
        return "on_pool"
    rows, width = metadata.tables.shape
    padded, real = rows * width * metadata.block, int(metadata.offsets.sum()) + rows
    if padded >= WASTE_FACTOR * real and padded - real >= WASTE_TOKENS_PER_ROW * rows:
        return "per_request"
    return "gather"


def decode(
    queries: mx.array,
    pool: PagePool,
    metadata: AttentionMetadata,
    layer: AttentionLayer,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return attention of ``[B, Hq, 1, D]`` over all tokens that each row sees.

    ``sinks [Hq]``: logit of an additional key per query head, whose value is zero.
    """
    attend = PATHS[choose_path(metadata, layer.dtype)]
    out: mx.array = attend(queries, pool, metadata, layer, scale, sinks)
    return out


def gather(
    queries: mx.array,
    pool: PagePool,
    metadata: AttentionMetadata,
    layer: AttentionLayer,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attend to one padded copy of the keys and values of all rows."""
    keys, values = metadata.read(pool, layer)
    return mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=scale, mask=metadata.mask(), sinks=sinks
    )


def per_request(
    queries: mx.array,
    pool: PagePool,
    metadata: AttentionMetadata,
    layer: AttentionLayer,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attend to a copy of each row's own keys and values, one row after the other."""
    heads, dim = layer.kv_heads, layer.head_dim
    pages = _as_runs(pool, metadata.block, layer)
    first_run = mx.arange(heads, dtype=mx.uint32)[:, None]
    out = []
    for row, table in enumerate(metadata.row_tables()):
        runs = table * (2 * heads) + first_run
        end = int(metadata.offsets[row]) + 1
        start = max(0, end - metadata.window) if metadata.window else 0
        keys, values = (
            pages[index].reshape(1, heads, -1, dim)[:, :, start:end]
            for index in (runs, runs + heads)
        )
        query = queries[row : row + 1]
        out.append(
            mx.fast.scaled_dot_product_attention(query, keys, values, scale=scale, sinks=sinks)
        )
    return mx.concatenate(out)


def on_pool(
    queries: mx.array,
    pool: PagePool,
    metadata: AttentionMetadata,
    layer: AttentionLayer,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Multiply with the pages in place; G query heads share a KV head.

    Softmax over several pages is combined as in flash attention: each tile keeps its maximum,
    its sum of exponentials and its unnormalised output, which are rescaled to the row's maximum.
    """
    batch, query_heads, _, dim = queries.shape
    heads = layer.kv_heads
    tiles = metadata.tiles(heads)
    pages = _as_runs(pool, metadata.block, layer)
    grouped = (queries * scale).reshape(batch * heads, query_heads // heads, dim)
    scores = mx.gather_mm(grouped, pages.swapaxes(-1, -2), tiles.queries, tiles.keys)
    scores = scores + tiles.bias  # [P, H, G, block]
    top = scores.max(axis=-1, keepdims=True)
    weights = mx.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    flat = weights.reshape(-1, query_heads // heads, metadata.block)
    partial = mx.gather_mm(flat, pages, tiles.own, tiles.values)  # [P, H, G, D]
    if tiles.by_row is None or tiles.row_bias is None:
        top, total, partial = (x.reshape(batch, -1, *x.shape[1:]) for x in (top, total, partial))
    else:
        top, total, partial = (x[tiles.by_row] for x in (top, total, partial))
        top = top + tiles.row_bias  # [B, W, H, G, 1]
    row_top = top.max(axis=1, keepdims=True)
    if sinks is not None:
        sink = sinks.reshape(heads, -1, 1)
        row_top = mx.maximum(row_top, sink)
    rescale = mx.exp(top - row_top)
    normaliser = (rescale * total).sum(axis=1)
    if sinks is not None:
        normaliser = normaliser + mx.exp(sink - row_top[:, 0])
    out = (rescale * partial).sum(axis=1) / normaliser
    return out.reshape(batch, query_heads, 1, dim)


def _as_runs(pool: PagePool, block: int, layer: AttentionLayer) -> mx.array:
    """Return the pool as runs ``[-1, block, D]`` of the layer's dtype; no copy."""
    return pool.pages.view(layer.dtype).reshape(-1, block, layer.head_dim)


PATHS = {"on_pool": on_pool, "per_request": per_request, "gather": gather}
