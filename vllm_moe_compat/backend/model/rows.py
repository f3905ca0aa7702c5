"""How many token ids a model has rows for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The token ids that a model can compute, and those that it can draw.

    Attributes:
        embedding: rows of the embeddings; a prompt's ids are below.
        head: columns of the logits; ids that parameters name are below.
    """

    embedding: int
    head: int
