"""A checkpoint's multi-token-prediction head as MLX modules.

A head predicts the token after the next one from the hidden state of a position and the token
that follows it: both are normed, joined, and passed through one decoder layer, or a few, of the
target's kind. mlx-lm's modules drop such tensors. ``load_heads`` loads them as a second, small
model of the target's own class; see ``plan.prediction_heads``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.nn as nn


@dataclass(frozen=True, slots=True)
class HeadParts:
    """The modules of a checkpoint's first prediction head, loaded and evaluated.

    With ``e`` the embedding of token ``i + 1`` and ``h`` the target's hidden state ``i``, both
    ``[B, T, H]``, the head computes
    ``norm(decoder(join(concatenate([embedding_norm(e), hidden_norm(h)], -1)), cache))``, with the
    parts in the other order unless ``embedding_first``; then the target's output head.

    Attributes:
        model: the mlx-lm model of the target's class that the decoder belongs to, for
            ``make_cache()`` and ``layers``. It has no embeddings and no output head.
        decoder: its part with the decoder layers. Its embeddings pass their argument on and its
            final norm is left out: ``decoder(joined [B, T, H], cache=[…])`` makes the masks,
            runs the layers and returns ``[B, T, H]``.
        join: the linear layer ``2H → H``.
        embedding_norm: norm of the embedding.
        hidden_norm: norm of the hidden state.
        norm: norm of the result; None if the head has none.
        embedding_first: whether the embedding comes first where both are concatenated.
        masks_first: whether the embedding at position 0 of a sequence counts as zeros.
        recycles_normed: whether the next draft of the same head starts from the hidden state
            after ``norm``; else from the one before.
        embedding: the head's own token embeddings, if they differ from the target's.
        output: the head's own output head, if it differs from the target's.
        weight_bytes: bytes of all of it.
    """

    model: nn.Module
    decoder: nn.Module
    join: nn.Module
    embedding_norm: nn.Module
    hidden_norm: nn.Module
    norm: nn.Module | None
    embedding_first: bool = True
    masks_first: bool = False
    recycles_normed: bool = True
    embedding: nn.Module | None = None
    output: nn.Module | None = None
    weight_bytes: int = 0
