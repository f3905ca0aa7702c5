"""The prediction head of a checkpoint as a module that drafts tokens (multi-token prediction).

Position i of a pass takes token i + 1 and the hidden state that the target computed at position
i, and predicts token i + 2; so the head's keys and values lie in the same slots as the target's.
For the next draft it takes the token that it drew and the hidden state that it returned itself.

    embedding of token i + 1 → norm ─┐
                                     ├→ join → decoder layers → norm → output head
    hidden state at i        → norm ─┘

``load.prediction_heads`` loads the parts. The decoder is the backbone of mlx-lm's own module for
the family, so masks, caches and attention are mlx-lm's. Embeddings and output head are the
target's, unless the head has its own.

The definitions are those of ``vllm/model_executor/models/*_mtp.py``. Which hidden state is passed
on differs between them: vLLM's drafter (``SpecDecodeBaseProposer.propose``) continues from what
``forward`` returns, and computes logits of it.

- ``qwen3_5_mtp``, ``qwen3_next_mtp``, ``mimo_v2_mtp``, ``exaone_moe_mtp``, ``nemotron_h_mtp``,
  ``bailing_moe_mtp``: ``forward`` ends with the norm.
- ``deepseek_mtp``: ``forward`` returns both; logits are computed of the one before the norm, which
  ``compute_logits`` applies, and the drafter continues from the one after it.
- ``glm4_moe_mtp``, ``glm4_moe_lite_mtp``: ``forward`` ends before the norm, which
  ``compute_logits`` applies.
- ``ernie_mtp``: there is no norm.

A release may have several heads, each for a further token. The first one is used for every draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vllm_moe_compat.backend.model import backbone
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.model.dry_run import dry_run
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.load.prediction_heads import HeadParts


class PredictionHeads(nn.Module):
    """The first prediction head of a target model.

    Its parameters are the head's own weights; those of the target are not among them.

    Attributes:
        layers: descriptions of its caches, numbered from 0.
    """

    layers: list[AttentionLayer]

    def __init__(self, target: nn.Module, parts: HeadParts) -> None:
        """Put the parts together, and describe the caches; ``target`` is not changed.

        Raises:
            UnsupportedServingError: the caches cannot be stored in pages.
        """
        super().__init__()
        self.embedding_norm, self.hidden_norm = parts.embedding_norm, parts.hidden_norm
        self.join, self.decoder = parts.join, parts.decoder
        self.norm = nn.Identity() if parts.norm is None else parts.norm
        self.embedding_first, self.masks_first = parts.embedding_first, parts.masks_first
        self.recycles_normed = parts.recycles_normed
        if parts.embedding is not None:
            self.embedding = parts.embedding
        if parts.output is not None:
            self.output = parts.output
        # Functions, since modules would count as parts of the head.
        own = parts.embedding
        embedding = backbone.embedding(target) if own is None else own
        self.embed: Callable[[mx.array], mx.array] = embedding.__call__
        self.logits = backbone.output_head(target, parts.output)
        self.make_cache: Callable[[], list[Any]] = lambda: make_prompt_cache(parts.model)
        # No item of the module, which would look for modules in it.
        object.__setattr__(self, "layers", _describe(self, parts.model))

    def __call__(
        self, tokens: mx.array, hidden: mx.array, cache: Sequence[Any]
    ) -> tuple[mx.array, mx.array]:
        """Predict the tokens after ``tokens``.

        Args:
            tokens: ``[B, T]``, the token after each position.
            hidden: ``[B, T, H]``, the target's hidden state of each position
                (``hidden_states``), or for a further draft what this returned for the one before.
            cache: one per layer, as mlx-lm's model of the family takes them (``nest_caches``).

        Returns:
            Logits ``[B, T, V]``, and hidden states ``[B, T, H]`` for the next draft.
        """
        normed, hidden = self.decode(tokens, hidden, cache)
        return self.logits(normed), hidden

    def decode(
        self, tokens: mx.array, hidden: mx.array, cache: Sequence[Any]
    ) -> tuple[mx.array, mx.array]:
        """Do the same without the output head.

        Returns:
            What ``logits`` takes, and hidden states for the next draft, ``[B, T, H]`` each.
        """
        embedded = self.embed(tokens)
        if self.masks_first:
            embedded = _without_first(embedded, _offset(cache[0]))
        both = [self.embedding_norm(embedded), self.hidden_norm(hidden)]
        if not self.embedding_first:
            both.reverse()
        # Some modules ask a cache for the mask of a kind of layers that the head has none of.
        caches = [*cache, None]
        decoded = self.decoder(self.join(mx.concatenate(both, axis=-1)), cache=caches)
        normed = self.norm(decoded)
        return normed, normed if self.recycles_normed else decoded


def _offset(cache: Any) -> mx.array | int:
    """Return the position of a pass's first token, ``[B]`` or one for all rows."""
    caches = getattr(cache, "caches", None)
    offset: mx.array | int = (cache if caches is None else caches[0]).offset
    return offset


def _without_first(embedded: mx.array, offset: mx.array | int) -> mx.array:
    """Return ``embedded [B, T, H]`` with zeros at position 0 of each text."""
    if isinstance(offset, int) and offset:
        return embedded
    positions = mx.arange(embedded.shape[1]) + mx.array(offset).reshape(-1, 1)
    return mx.where(positions[..., None] == 0, mx.zeros_like(embedded), embedded)


class _OnTokens(nn.Module):
    """A head as a model of token ids alone, whose caches can be described."""

    def __init__(self, heads: PredictionHeads, model: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        # Functions, so that ``model`` is no part: a hook would look at its modules too.
        self.make_cache = lambda: make_prompt_cache(model)
        self._layers: Callable[[], Any] = lambda: model.layers

    @property
    def layers(self) -> Any:
        return self._layers()

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        hidden = mx.zeros_like(self.heads.embed(tokens))
        logits, _ = self.heads(tokens, hidden, cache)
        return logits


def _describe(heads: PredictionHeads, model: nn.Module) -> list[AttentionLayer]:
    """Return descriptions of the head's caches, on which its code is tried."""
    on_tokens = _OnTokens(heads, model)
    found = dry_run(on_tokens, describe(on_tokens)).layers
    kept = [layer for layer in found if isinstance(layer, AttentionLayer)]
    if len(kept) < len(found):
        raise UnsupportedServingError(
            f"The embedded MLX backend cannot serve {type(model).__module__} with prediction "
            "heads: a head of this checkpoint has a state of fixed size; serve the model without "
            "speculation, or with the method ngram."
        )
    return kept
