"""An estimate of the memory that a forward pass takes beside weights and pages.

A pass takes memory that is fixed, and memory that grows with its tokens. Both come from the peaks
of two short passes; these make most of the time of a start on a CPU, so they are as short as a
line through two points allows. The scores of attention grow with tokens times context, which short
passes do not show; they are computed, and bounded by ``pages/long_attention.py``. So is the copy
of one context's keys and values that a part of a prompt attends to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.pages import long_attention
from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer
from vllm_moe_compat.expert_cache.current_pass import building_only
from vllm_moe_compat.ranks import pipeline

# Tokens of the two passes that are measured.
MEASURED_TOKENS = (4, 16)


def measure(model: nn.Module, layers: Sequence[Layer], tokens: int, longest: int) -> int:
    """Return the peak bytes of a prefill of ``tokens`` tokens in prompts of up to ``longest``.

    The model's head is not computed, as in every prefill.
    """
    short, long = MEASURED_TOKENS
    low, high = (_peak(model, count) for count in MEASURED_TOKENS)
    per_token = max(0.0, (high - low) / (long - short))
    linear = math.ceil(high + per_token * max(0, tokens - long))
    read = max((x.token_bytes for x in layers if isinstance(x, AttentionLayer)), default=0)
    scores = long_attention.peak_bytes(_score_heads(model), tokens, longest)
    return linear + scores + read * longest


def _peak(model: nn.Module, count: int) -> int:
    caches = make_prompt_cache(model)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model(mx.zeros((1, count), dtype=mx.int32), cache=caches)
    mx.eval([cache.state for cache in caches], pipeline.given(model))
    return int(mx.get_peak_memory()) - int(before)


def _score_heads(model: nn.Module) -> int:
    """Return the most query heads of a layer whose scores become an array."""
    # No caches are recorded: they would hold the graph, and with it the weights, in a cycle.
    with attention_hook.recording(model, ()) as record, building_only():
        # Not evaluated: only the shapes matter.
        model(mx.zeros((1, 2), dtype=mx.int32), cache=make_prompt_cache(model))
    found = [count for count, size in record.heads if not long_attention.is_fused(size)]
    return max(found, default=0)
