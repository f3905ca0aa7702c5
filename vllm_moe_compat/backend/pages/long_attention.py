"""Attention of many new tokens with bounded memory for its scores.

Where attention is not a fused kernel (on the CPU, and for some head sizes on a GPU), its scores
``[B, Hq, T, L]`` exist as an array: 8,192 tokens of a prompt and 32 heads make 8 GiB. ``attend``
computes the queries in parts whose scores stay below ``SCORE_LIMIT``, one part after the other.
Every query sees the same keys in the same order, so the result is the same, bit for bit on the
CPU; and a part of a causal prompt leaves out the keys behind it, which is less work.
"""

from __future__ import annotations

import mlx.core as mx

# Bytes of scores in one part, as float32.
SCORE_LIMIT = 32 << 20
SCORE_BYTES = 4
# Arrays of such a size that may exist at a time: MLX allocates for tasks that have not begun yet,
# and holds up to four parts. A sink or a mask makes more copies of one part.
COPIES = 5
# Metal has fused kernels for prompts with these head sizes. Not measured.
FUSED_HEAD_DIMS = (64, 80, 128)


def is_fused(head_dim: int) -> bool:
    """Return whether MLX computes attention of prompts in one kernel, without scores."""
    return mx.default_device().type == mx.DeviceType.gpu and head_dim in FUSED_HEAD_DIMS


def peak_bytes(heads: int, tokens: int, context: int) -> int:
    """Return the memory of ``attend`` for scores of ``tokens`` queries, at most."""
    return COPIES * min(SCORE_BYTES * heads * tokens * context, SCORE_LIMIT)


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return attention of ``queries [B, Hq, T, D]`` over ``keys`` and ``values [B, H, L, D]``.

    Args:
        queries: see above.
        keys: see above.
        values: see above.
        scale: factor of the scores.
        mask: None, ``"causal"``, or ``[T, L]`` or ``[B, 1, T, L]``.
        sinks: ``[Hq]``, logit of an additional key per query head, whose value is zero.
    """
    batch, heads, count, head_dim = queries.shape
    context = keys.shape[2]
    part = max(1, SCORE_LIMIT // (SCORE_BYTES * batch * heads * context))
    if part >= count or is_fused(head_dim):
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    out: list[mx.array] = []
    for start in range(0, count, part):
        stop = min(start + part, count)
        some, visible = queries[:, :, start:stop], context
        mine: mx.array | str | None = mask
        if isinstance(mask, mx.array):
            mine = mask[..., start:stop, :]
        elif mask == "causal":
            visible = context - count + stop
        part_of = [some, keys[:, :, :visible], values[:, :, :visible]]
        if out:
            # MLX would compute all parts' scores before the first softmax.
            part_of = mx.depends(part_of, [out[-1]])
        out.append(
            mx.fast.scaled_dot_product_attention(*part_of, scale=scale, mask=mine, sinks=sinks)
        )
    return mx.concatenate(out, axis=2)
