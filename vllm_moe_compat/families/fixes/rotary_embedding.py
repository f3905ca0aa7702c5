"""A rotary embedding with explicit frequencies, in place of one of mlx-lm's."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.families.fixes.rotary_frequencies import Rotary

_CLOSE = 1e-5
"""Relative error of frequencies that mlx-lm's own definitions reach in float32: 2e-6."""


class RotaryEmbedding(nn.Module):  # type: ignore[misc]
    """Turns the first ``dims`` dimensions of heads ``[B, H, L, D]``.

    LongRoPE has other frequencies beyond its length, and with the dynamic type they change with
    it. transformers goes by the longest sequence of each pass, and leaves cached keys as they
    are; so does this. ``longest`` fixes the choice for all passes, for a server whose requests
    must not depend on each other.

    Attributes:
        rotary: the embedding in numbers.
        traditional: whether neighbouring dimensions form a pair, not the two halves.
        longest: longest sequence that will come, if one choice is to hold for all; else None.
    """

    def __init__(self, rotary: Rotary, traditional: bool) -> None:
        super().__init__()
        self.rotary, self.traditional = rotary, traditional
        self.longest: int | None = None
        self._short = _wavelengths(rotary.inverse)
        self._long = _wavelengths(rotary.long) if rotary.long else None

    @property
    def dims(self) -> int:
        """How many dimensions are turned."""
        return self.rotary.dims

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Return ``x``, turned; ``offset`` is the first position, or ``[B]`` of them."""
        freqs, scale = self._at(x.shape[-2], offset)
        if isinstance(scale, mx.array) or scale != 1.0:
            if isinstance(scale, mx.array):
                scale = scale.astype(x.dtype)
            x = x.at[..., : self.dims].multiply(scale)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=freqs,
        )

    def _at(self, tokens: int, offset: int | mx.array) -> tuple[mx.array, float | mx.array]:
        """Return wavelengths and scale of a pass of so many tokens."""
        rotary = self.rotary
        if rotary.length is None:
            return self._short, rotary.scale
        if self.longest is not None:
            offset, tokens = 0, self.longest
        if isinstance(offset, mx.array):
            return self._later(mx.max(offset) + tokens, rotary.length)
        if offset + tokens <= rotary.length:
            return self._short, rotary.scale
        if self._long is None:
            return self._grown(offset + tokens, rotary.length), rotary.scale
        return self._long, rotary.long_scale

    def _later(self, total: mx.array, length: int) -> tuple[mx.array, float | mx.array]:
        """Return wavelengths and scale for a length that is not computed yet."""
        rotary, beyond = self.rotary, total > length
        if self._long is None:
            return self._grown(mx.maximum(total, length), length), rotary.scale
        freqs = mx.where(beyond, self._long, self._short)
        if rotary.scale == rotary.long_scale:
            return freqs, rotary.scale
        return freqs, mx.where(beyond, rotary.long_scale, rotary.scale)

    def _grown(self, total: Any, length: int) -> mx.array:
        """Return the wavelengths ``[D/2]`` of the dynamic type for a sequence of ``total``."""
        rotary, dims = self.rotary, self.dims
        growth = (rotary.factor * total / length - (rotary.factor - 1)) ** (dims / (dims - 2))
        exponents = mx.arange(0, dims, 2, dtype=mx.float32) / dims
        return mx.power(rotary.base * growth, exponents)


def _wavelengths(inverse: tuple[float, ...]) -> mx.array:
    """Return what ``mx.fast.rope`` divides positions by, ``[D/2]`` float32."""
    return mx.array([1.0 / x if x else float("inf") for x in inverse], dtype=mx.float32)


def computes(rope: Any, rotary: Rotary, traditional: bool) -> bool:
    """Whether an embedding, of whatever class, turns every pair of dimensions as ``rotary``.

    It is called on position 1, on the CPU, where sines and cosines are exact in float32.
    """
    if isinstance(rope, RotaryEmbedding):
        return rope.rotary == rotary and rope.traditional == traditional
    if rotary.length is not None:
        return False  # mlx-lm's have one set of frequencies, or take one sequence at a time.
    dims, half = rotary.dims, rotary.dims // 2
    width = max(dims, getattr(rope, "dims", getattr(rope, "dim", dims)))
    first = [2 * i if traditional else i for i in range(half)]
    second = [2 * i + 1 if traditional else i + half for i in range(half)]
    probe = [0.0 if i in second else 1.0 for i in range(width)]
    with mx.stream(mx.cpu):
        turned = rope(mx.array(probe).reshape(1, 1, 1, width), offset=1).flatten().tolist()
    for i, j, want in zip(first, second, rotary.inverse, strict=True):
        angle, scale = math.atan2(turned[j], turned[i]), math.hypot(turned[i], turned[j])
        if abs(angle - want) > _CLOSE * want or abs(scale - rotary.scale) > _CLOSE * rotary.scale:
            return False
    return all(abs(x - 1.0) < _CLOSE for x in turned[dims:])
