"""Latent attention (MLA) of a pass over drafts, computed as in passes of one token.

For one token, mlx-lm's latent attention works on the latents; for several, it expands keys and
values of the whole context from them. That rounds in another way, and takes the context times the
heads of work, for a few drafts. So in a pass whose tokens attend one by one
(``AttentionMetadata.by_token``), these layers get ``B*T`` rows of one token: their own code, on a
cache that writes the keys of all rows as usual and reads, for each token, what it may see.

The layers are known by their parts: the products that bring queries to the latents and results
back (``embed_q``, ``unembed_out``). They have a class of their own while such a pass is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.backend.pages import long_attention
from vllm_moe_compat.backend.pages.paged_kv import PagedKV
from vllm_moe_compat.families.fixes.fix import named

PARTS = ("embed_q", "unembed_out")


class SingleTokens:
    """The cache of a layer, for its ``B*T`` tokens as rows of one token."""

    def __init__(self, whole: PagedKV) -> None:
        self.whole, self.metadata = whole, whole.metadata.single_tokens()
        self.offset = self.metadata.offset

    def mask(self) -> Any:
        """Return the mask ``[B*T, 1, 1, L]``; None if nothing is hidden."""
        return self.metadata.mask(as_array=True)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write ``[B*T, H, 1, D]``; return what each token sees, ``[B*T, H, L, D]``."""
        width = self.whole.metadata.width
        # [B*T, H, 1, D] → [B, H, T, D].
        self.whole.update_and_fetch(
            *(
                x.squeeze(2).reshape(-1, width, *x.shape[1::2]).swapaxes(1, 2)
                for x in (keys, values)
            )
        )
        return self.metadata.read(self.whole.pool, self.whole.layer)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return attention of ``queries [B*T, Hq, 1, D]``, as ``PagedKV.attend``."""
        return long_attention.attend(queries, keys, values, scale, mask, sinks)


def _is_split(whole: PagedKV) -> bool:
    """Return whether the tokens of a pass can be rows of their own."""
    metadata, layer = whole.metadata, whole.layer
    return metadata.verifies and metadata.window is None and not layer.single_sequence


@cache
def _by_token(kind: type) -> type:
    """Return a subclass that computes the tokens of a pass over drafts as rows of one token."""
    original: Callable[..., mx.array] = kind.__call__
    signature = inspect.signature(original)

    def call(self: Any, *args: Any, **options: Any) -> mx.array:
        bound = signature.bind(self, *args, **options)
        given = bound.arguments
        whole = given.get("cache")
        if not isinstance(whole, PagedKV) or not _is_split(whole):
            return original(*bound.args, **bound.kwargs)
        rows, width, _ = given["x"].shape
        given["x"] = given["x"].reshape(rows * width, 1, -1)
        given["cache"] = SingleTokens(whole)
        given["mask"] = given["cache"].mask()
        if "attn_scale" in given:  # [B, 1, T, 1]
            given["attn_scale"] = given["attn_scale"].reshape(-1, 1, 1, 1)
        return original(*bound.args, **bound.kwargs).reshape(rows, width, -1)

    return named(type(kind.__name__, (kind,), {"__call__": call}), kind)


class LatentByToken:
    """The latent attention of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._parts: list[Any] = [
            part for part in model.modules() if all(name in part for name in PARTS)
        ]

    @contextmanager
    def during(self) -> Iterator[None]:
        """Compute passes over drafts, that are built inside, token by token."""
        before: list[type] = [type(part) for part in self._parts]
        try:
            for part, kind in zip(self._parts, before, strict=True):
                part.__class__ = _by_token(kind)
            yield
        finally:
            for part, kind in zip(self._parts, before, strict=True):
                part.__class__ = kind
