"""The memory that speculation takes beside weights and pages.

A step that verifies ``k`` drafts holds the logits of ``k + 1`` positions per row, in MLX's array
and in the sampler's copy, and the states after each of these tokens: the state before them is let
go when they are there, and the one that stays is gathered before they are.

A prediction head computes one decoder layer, which takes no more than the target's own pass over
as many tokens, and what it joins. The target's hidden states wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_moe_compat.backend.step.mtp import MOST_UNSEEN
from vllm_moe_compat.backend.vllm import speculation

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_moe_compat.backend.model.loader import ServedModel

LOGITS = 4
"""Bytes of one logit: samplers compute in float32."""
COPIES = 2
JOINED = 4
"""Arrays ``[T, H]`` that a head makes of its inputs: two normed ones, and both of them joined."""


@dataclass(frozen=True, slots=True)
class DraftMemory:
    """What speculation adds.

    Attributes:
        states: the states that a sequence has at once; 1 without speculation.
        activations: bytes.
    """

    states: int = 1
    activations: int = 0


def measure(vllm_config: VllmConfig, served: ServedModel) -> DraftMemory:
    """Return what the speculation of ``vllm_config`` adds."""
    found = speculation.read(vllm_config)
    if found is None:
        return DraftMemory()
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    sequences, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    rows = min(sequences * (1 + found.most), tokens)
    added = rows * model.get_vocab_size() * LOGITS * COPIES
    if served.heads is not None:
        width = model.get_hidden_size() * served.heads.layers[0].dtype.size
        added += (tokens * (1 + JOINED) + sequences * MOST_UNSEEN) * width
    # A step schedules no more tokens of a request, its drafts included.
    return DraftMemory(1 + min(1 + found.most, tokens), added)
