"""A check at start-up that paged prediction heads compute what they do on mlx-lm's own caches.

A wrong head changes no answer, since drafts are verified, and would only be accepted less often,
so nobody would notice. Two prompts go through a pass for keys and values alone, and a padded pass
that drafts; the latter's result is compared with that of one pass over all tokens of each prompt.
Embeddings take the place of the model's hidden states. It is the heads' warm-up too.
"""

from __future__ import annotations

import mlx.core as mx

from vllm_moe_compat.backend.step.head_passes import HeadPasses, HeadRow
from vllm_moe_compat.backend.step.self_check import TOKENS, TOLERANCE, requests_on_pages
from vllm_moe_compat.errors import UnsupportedServingError

# Positions of a prompt that the pass for keys and values takes.
FIRST = 2


def run(passes: HeadPasses) -> None:
    """Compare paged passes with mlx-lm's; leave the pages as they were.

    Raises:
        UnsupportedServingError: the results differ.
    """
    storage, heads = passes.storage, passes.heads
    requests = requests_on_pages(storage, TOKENS, storage.layers)
    rows, own = [], []
    for request in requests:
        known = request.num_tokens - 1
        hidden = heads.embed(mx.array([request.tokens(0, known)]))
        rows.append(HeadRow(request, 0, hidden[0]))
        normed, _ = heads.decode(mx.array([request.tokens(1, known)]), hidden, heads.make_cache())
        own.append(normed[0, -(known - FIRST) :])
    mx.eval(own)
    try:
        passes.write([row.split(FIRST)[0] for row in rows])
        rest = [row.split(FIRST)[1] for row in rows]
        for paged, expected in zip(passes.outputs(rest), own, strict=True):
            _compare(paged, expected)
        passes.draft(rest, [2] * len(rest))
    finally:
        used = sorted({block for r in requests for group in r.blocks for block in group})
        for pool in storage.distinct_pools:
            pool.zero(used)
            mx.eval(pool.pages)


def _compare(paged: mx.array, own: mx.array) -> None:
    tolerance = TOLERANCE[own.dtype]
    own, paged = own.astype(mx.float32), paged.astype(mx.float32)
    if not mx.isfinite(own).all().item():
        return  # A token of a fine-tune may have NaN in its row; its drafts are not right then.
    error = float((mx.linalg.norm(paged - own) / mx.linalg.norm(own)).item())  # type: ignore[arg-type]
    if not error <= tolerance:
        raise UnsupportedServingError(
            "The embedded MLX backend cannot serve with --speculative-config with method mtp: the "
            f"prediction head on pages differs from mlx-lm's own caches by {error:.2g} (relative "
            "L2); use ngram, or leave it out."
        )
