"""Forward passes of a model whose experts are partly on disk.

Such a model's containers (``expert_cache``) read the router's choice back while the graph of a
pass is built, so the pass is computed piece by piece, and there is nothing to build early or to
compile. They are told which positions of the batch are real: padding reads no experts, and neither
does a request that has failed. An expert that cannot be read fails the rows that need it; all
other rows are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn
import numpy as np

from vllm_moe_compat.backend.step.batch import Pass
from vllm_moe_compat.expert_cache.cached_experts import CachedExperts
from vllm_moe_compat.expert_cache.current_pass import current_pass


class ExpertReads:
    """What the passes of one model read from disk.

    Attributes:
        failed_rows: rows of the last pass for which an expert could not be read, and why.
    """

    def __init__(self, model: nn.Module) -> None:
        self._reading = [x for x in model.modules() if isinstance(x, CachedExperts)]
        self.failed_rows: dict[int, Exception] = {}

    def may_miss(self) -> bool:
        """Return whether a pass may have to read experts."""
        # Containers become resident once all of their experts are in memory, and stay so.
        self._reading = [container for container in self._reading if not container.resident]
        return bool(self._reading)

    @contextmanager
    def during(self, work: Pass) -> Iterator[None]:
        """Run a pass; its outputs must be scheduled before this ends."""
        self.failed_rows = {}
        if not self.may_miss():
            yield
            return
        failed = [request.failed for request in work.requests]
        lengths = np.where(failed, 0, work.lengths)
        rows, tokens = work.tokens.shape
        with current_pass(rows, tokens, lengths.tolist()) as running:
            yield
        self.failed_rows = dict(running.failed_rows)
