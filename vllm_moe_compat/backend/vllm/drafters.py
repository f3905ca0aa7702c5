"""What drafts in an engine, by vLLM's configuration."""

from __future__ import annotations

from vllm_moe_compat.backend.step.drafting import Drafting, lengths_of
from vllm_moe_compat.backend.step.ngram import NgramDrafter
from vllm_moe_compat.backend.vllm.speculation import Speculation


def make(speculation: Speculation | None, max_model_len: int) -> Drafting | None:
    """Return what drafts, or None without speculation.

    Args:
        speculation: how drafts are made.
        max_model_len: tokens of a request.
    """
    if speculation is None:
        return None
    most = speculation.most
    shortest, longest = speculation.prompt_lookup_min, speculation.prompt_lookup_max
    return Drafting(NgramDrafter(shortest, longest, max_model_len), lengths_of(most))
