"""What drafts in an engine, by vLLM's configuration."""

from __future__ import annotations

from vllm_moe_compat.backend.model.prediction_heads import PredictionHeads
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.drafting import Drafting, lengths_of
from vllm_moe_compat.backend.step.head_passes import HeadPasses
from vllm_moe_compat.backend.step.mtp import MtpDrafter
from vllm_moe_compat.backend.step.ngram import NgramDrafter
from vllm_moe_compat.backend.vllm.speculation import Speculation


def make(
    speculation: Speculation | None,
    max_model_len: int,
    heads: PredictionHeads | None,
    storage: LayerStorage,
    token_rows: int,
) -> Drafting | None:
    """Return what drafts, or None without speculation.

    Args:
        speculation: how drafts are made.
        max_model_len: tokens of a request.
        heads: the checkpoint's prediction heads, if they draft.
        storage: of the model's layers, and of those of the heads.
        token_rows: token ids that the embeddings have rows for.
    """
    if speculation is None:
        return None
    most = speculation.most
    shortest, longest = speculation.prompt_lookup_min, speculation.prompt_lookup_max
    states, block = storage.states, None
    if states.layers and storage.keep_boundaries:
        block = storage.block_sizes[states.groups[0]]
    if heads is None:
        return Drafting(NgramDrafter(shortest, longest, max_model_len), lengths_of(most), block)
    assert storage.heads is not None, "it is made for the heads"
    passes = HeadPasses(heads, storage.heads, token_rows)
    return Drafting(MtpDrafter(passes, max_model_len), lengths_of(most), block)
