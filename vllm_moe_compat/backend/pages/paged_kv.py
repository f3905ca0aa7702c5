"""The cache object that one softmax layer gets for one forward pass.

mlx-lm's models use three members of a cache (``offset``, ``make_mask``, ``update_and_fetch``);
an object with these members replaces mlx-lm's own cache and the model code stays untouched. New
keys and values ``[B, H, T, D]`` are written to the pages of their requests, and all keys and
values visible to each row, ``[B, H, L, D]``, are read back.

Where a model passes the cache's keys and values unchanged to its attention function
(``AttentionLayer.attends_itself``), a pass of one token per row skips the read: the hook of
``model.attention_hook`` calls ``attend``, which computes attention on the pages
(``decode_attention``). So does a pass that verifies drafts, token by token.

Page layout: ``[2, H, block, D]``, keys before values, head-major. One row of D elements is the
unit of writing; a run of ``block`` rows of one head is the unit of reading, so that gathered runs
need no transpose. If keys and values differ in size, a page is ``[1, H, block, Dk + Dv]``.
"""

from __future__ import annotations

import mlx.core as mx

from vllm_moe_compat.backend.pages import decode_attention, long_attention
from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.backend.pages.page_pool import RAW_DTYPES, PagePool
from vllm_moe_compat.errors import UnsupportedServingError


class PagedKV:
    """The cache of one softmax layer during one forward pass."""

    # mlx-lm's chunked cache drops tokens that later chunks cannot see and counts them here;
    # pages keep them, and the model masks them anyway.
    start_position = 0

    def __init__(
        self,
        layer: AttentionLayer,
        pool: PagePool,
        metadata: AttentionMetadata,
        *,
        attends_itself: bool = False,
    ) -> None:
        """``attends_itself``: the layer's attention function calls ``attend``."""
        self.layer, self.pool, self.metadata = layer, pool, metadata
        # Code for a single sequence computes with ``offset`` as an int.
        self.offset = int(metadata.positions[0]) if layer.single_sequence else metadata.offset
        # ``[B, T]``, tokens of a pass over drafts whose keys or values are not finite; they are
        # stored as zeros.
        self.broken: mx.array | None = None
        self.on_pages = attends_itself and (metadata.width == 1 or metadata.by_token is not None)

    def maybe_trim_front(self) -> None:
        """Member of mlx-lm's chunked cache; nothing to trim, since pages keep every token."""

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Return the mask for ``n`` new tokens in a form that mlx's attention takes.

        Raises:
            UnsupportedServingError: the model asks for another window than its own cache has.
        """
        if window_size not in (None, self.layer.window):
            raise UnsupportedServingError(
                f"The embedded MLX backend cannot serve cache {self.layer.index}: the model asks "
                f"for a window of {window_size} tokens, but its own cache keeps "
                f"{self.layer.window or 'all'}; use mlx-lm's own server for this model."
            )
        return None if self.on_pages else self.metadata.mask(return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write ``[B, H, T, D]`` to the pages and return all keys and values in view.

        Returns keys and values ``[B, H, L, D]`` in the order of their positions. Where nothing
        has to be read (a prompt from its first token, or attention on the pages), the arguments
        are returned.
        """
        metadata, layer = self.metadata, self.layer
        if metadata.verifies:
            # A mask does not stop NaN, and a draft must not harm the tokens before it.
            finite = mx.isfinite(keys).all(axis=(1, 3)) & mx.isfinite(values).all(axis=(1, 3))
            self.broken = ~finite
            keys, values = (mx.where(finite[:, None, :, None], x, 0) for x in (keys, values))
        # [B, planes, H, T, D] → [B*T, planes*H, D]: the order of ``metadata.rows``.
        if layer.planes == 2:
            both = mx.stack([keys, values], axis=1).astype(layer.dtype)
        else:
            both = mx.concatenate([keys, values], axis=-1).astype(layer.dtype)[:, None]
        count = layer.planes * layer.kv_heads
        flat = both.transpose(0, 3, 1, 2, 4).reshape(-1, count, layer.row)
        if metadata.tokens is not None:
            flat = flat[metadata.tokens]
        self.pool.write_rows(metadata.rows(count), flat.view(RAW_DTYPES[layer.dtype.size]))
        if metadata.from_start or self.on_pages:
            return keys, values
        return metadata.read(self.pool, layer)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return attention of ``queries [B, Hq, T, D]`` over the keys of ``update_and_fetch``.

        ``sinks [Hq]``: logit of an additional key per query head, whose value is zero.
        """
        if self.on_pages and self.metadata.by_token is not None:
            # [B, Hq, T, D] → [B*T, Hq, 1, D] and back.
            batch, heads, width, _ = queries.shape
            single = queries.swapaxes(1, 2).reshape(batch * width, heads, 1, -1)
            out = decode_attention.decode(
                single, self.pool, self.metadata.by_token, self.layer, scale, sinks
            )
            return out.reshape(batch, width, heads, -1).swapaxes(1, 2)
        if self.on_pages:
            return decode_attention.decode(
                queries, self.pool, self.metadata, self.layer, scale, sinks
            )
        return long_attention.attend(queries, keys, values, scale, mask, sinks)
