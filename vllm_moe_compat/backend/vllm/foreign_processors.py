"""Logits processors from outside vLLM, while drafts are verified.

vLLM calls a logits processor once per step, with the logits of the whole batch. A step that
verifies drafts draws several tokens for some of its requests, and a processor may count its calls.
So each request gets an instance of its own, which is called for each of its tokens and not for
those of others. Instances go from request to request, like the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor


class OnePerRequest(LogitsProcessor):
    """A processor of a batch, made of one for each row.

    Attributes:
        rows: the rows that take part in the next calls; None for all.
    """

    def __init__(self, first: LogitsProcessor, make: Callable[[], LogitsProcessor]) -> None:
        """``make`` returns another processor like ``first``."""
        self.rows: Collection[int] | None = None
        self._invariant: bool = first.is_argmax_invariant()
        self._make, self._free = make, [first]
        self._by_row: dict[int, LogitsProcessor] = {}

    def is_argmax_invariant(self) -> bool:
        """Return what the processor says."""
        return self._invariant

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Hand on what changes for each row."""
        changed = set()
        if batch_update is not None:
            for row in batch_update.removed:
                self._release(row)
            for row, *request in batch_update.added:
                if row not in self._by_row:
                    self._by_row[row] = self._free.pop() if self._free else self._make()
                self._by_row[row].update_state(BatchUpdate(1, [], [(0, *request)], []))
                changed.add(row)
            for source, target, direction in batch_update.moved:
                changed = {_moved(row, source, target) for row in changed}
                if direction == MoveDirectionality.UNIDIRECTIONAL:
                    self._release(target)
                both = {_moved(row, source, target): row for row in (source, target)}
                self._by_row |= {
                    new: self._by_row.pop(old) for new, old in both.items() if old in self._by_row
                }
        for row, one in self._by_row.items():
            if row not in changed and (self.rows is None or row in self.rows):
                one.update_state(None)

    def _release(self, row: int) -> None:
        one = self._by_row.pop(row, None)
        if one is not None:
            one.update_state(BatchUpdate(0, [0], [], []))
            self._free.append(one)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply each row's processor to its row of ``logits [B, V]``."""
        for row, one in self._by_row.items():
            if self.rows is None or row in self.rows:
                logits[row : row + 1] = one.apply(logits[row : row + 1])
        return logits


def _moved(row: int, source: int, target: int) -> int:
    return {source: target, target: source}.get(row, row)


def is_foreign(processor: LogitsProcessor) -> bool:
    """Return whether a processor is from outside vLLM."""
    return not type(processor).__module__.startswith("vllm.v1.sample.")


def one_per_request(
    processors: LogitsProcessors, make: Callable[[type], LogitsProcessor]
) -> tuple[LogitsProcessors, list[OnePerRequest]]:
    """Return ``processors`` with one of each foreign one per request, and these."""
    wrapped: list[OnePerRequest] = []

    def each(one: Any) -> Any:
        if not is_foreign(one):
            return one
        wrapped.append(OnePerRequest(one, partial(make, type(one))))
        return wrapped[-1]

    return LogitsProcessors([each(one) for one in processors.all]), wrapped
