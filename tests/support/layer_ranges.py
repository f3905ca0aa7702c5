"""Ranges of a model's layers in one process."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx


@dataclass
class Hand:
    """The transport between ranges that are computed one after the other, in one process."""

    taken: mx.array | None = None
    given: list[mx.array] = field(default_factory=list)

    def receive(self, like: mx.array) -> mx.array:
        assert self.taken is not None
        assert (self.taken.shape, self.taken.dtype) == (like.shape, like.dtype)
        return self.taken

    def give(self, result: mx.array) -> mx.array:
        self.given.append(result)
        return result

    def tell(self, result: mx.array) -> mx.array:
        return result
