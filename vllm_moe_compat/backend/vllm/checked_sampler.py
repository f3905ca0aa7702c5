"""vLLM's sampler, which also says which rows have nothing to be drawn.

A mask of allowed tokens, forbidden words, a grammar or a bias may leave a row without a token, or
with infinite logits. vLLM's sampler then returns some token, mostly 0. This one notes such rows,
so that their requests can end instead.

While drafts are verified, a part of the batch's rows goes on at each position. Parameters belong
to rows of the whole batch, so all rows go through vLLM's sampler. But sorting for top-k and top-p,
which takes most of the time, and drawing, which changes generators, are for the rows that go on.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def __init__(self, **options: Any) -> None:
        """Take vLLM's arguments."""
        super().__init__(**options)
        self._some_rows = _SomeRows(self.get_submodule("topk_topp_sampler"))
        self.topk_topp_sampler = self._some_rows

    def sample_rows(self, rows: Sequence[int], logits: torch.Tensor, metadata: Any) -> Any:
        """Return what vLLM returns for ``logits [B, V]``; only ``rows`` of it are of use."""
        self._some_rows.rows = list(rows) if len(rows) < len(logits) else None
        return self(logits=logits, sampling_metadata=metadata)

    def apply_logits_processors(self, logits: Any, *args: Any, **options: Any) -> Any:
        """Apply parameters to ``logits [B, V]``, and make rows without a token harmless."""
        logits = super().apply_logits_processors(logits, *args, **options)
        self.tops = logits.max(dim=-1).values
        logits[~self.tops.isfinite()] = 0
        return logits


class _SomeRows(torch.nn.Module):
    """vLLM's ``TopKTopPSampler`` for some rows of a batch; None: for all."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.rows: list[int] | None = None

    def forward(self, logits: Any, generators: Any, k: Any, p: Any) -> tuple[Any, Any]:
        if self.rows is None:
            both: tuple[Any, Any] = self.inner(logits, generators, k, p)
            return both
        rows = self.rows
        own = {i: generators[row] for i, row in enumerate(rows) if row in generators}
        drawn, processed = self.inner(
            logits[rows], own, None if k is None else k[rows], None if p is None else p[rows]
        )
        tokens = drawn.new_zeros(len(logits))
        tokens[rows] = drawn
        if processed is not None:
            logits[rows] = processed
            processed = logits
        return tokens, processed


def reason_without_token(top: float) -> str:
    """Return why a row whose largest logit is ``top`` gives no token."""
    if top == -torch.inf:
        return (
            "no token is left to draw: its parameters (allowed_token_ids, bad_words, logit_bias, "
            "min_tokens, a grammar) exclude every one"
        )
    return "its parameters make logits infinite or NaN"
