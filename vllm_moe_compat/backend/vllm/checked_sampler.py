"""vLLM's sampler, which also says which rows have nothing to be drawn.

A mask of allowed tokens, forbidden words, a grammar or a bias may leave a row without a token, or
with infinite logits. vLLM's sampler then returns some token, mostly 0. This one notes such rows,
so that their requests can end instead.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.sampler import Sampler


class CheckedSampler(Sampler):
    """Samples like vLLM.

    Attributes:
        tops: ``[B]``, the largest logit of each row of the last call after all that parameters
            do to them; not finite if nothing can be drawn.
    """

    tops: torch.Tensor

    def apply_logits_processors(self, logits: Any, *args: Any, **options: Any) -> Any:
        """Apply parameters to ``logits [B, V]``, and make rows without a token harmless."""
        logits = super().apply_logits_processors(logits, *args, **options)
        self.tops = logits.max(dim=-1).values
        logits[~self.tops.isfinite()] = 0
        return logits


def reason_without_token(top: float) -> str:
    """Return why a row whose largest logit is ``top`` gives no token."""
    if top == -torch.inf:
        return (
            "no token is left to draw: its parameters (allowed_token_ids, bad_words, logit_bias, "
            "min_tokens, a grammar) exclude every one"
        )
    return "its parameters make logits infinite or NaN"
