"""A debugging aid: ranks compare what they are about to evaluate.

MLX's collectives carry no tags. Two ranks that evaluate other passes, or the same ones in another
order, add the wrong numbers to each other without an error, or wait for ever. With the check on,
each pass and each exchange of tokens is preceded by a collective of one fixed shape, which tells
the others a counter and digests of what follows. All ranks see the same answers, so all of them
end with the same sentence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from vllm_moe_compat.log import logger
from vllm_moe_compat.ranks.same_tokens import RanksDisagreeError

WIDTH = 10
"""Numbers that are told at a time: step, counter, kind, and one for each fact."""
_FIXED = ("step", "number of evaluations", "kind of evaluation")


class OrderCheck:
    """Compares what the ranks of a group do."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        self.step = 0
        self.count = 0

    def begin_step(self) -> None:
        """Note that a step begins."""
        self.step += 1

    def agree(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Compare with the other ranks what this one is about to evaluate; all of them call it.

        Args:
            kind: of the evaluation.
            facts: name → what decides the evaluation; as many, in the same order, for a kind.

        Raises:
            RanksDisagreeError: they differ.
        """
        self.count += 1
        names = [*_FIXED, *facts]
        own = [self.step, self.count, _digest(kind), *map(_digest, facts.values())]
        own += [0] * (WIDTH - len(own))
        told = mx.distributed.all_gather(mx.array([own], dtype=mx.int32), group=self._group)
        rows = np.array(told)
        for rank, row in enumerate(rows):
            different = np.flatnonzero(row != rows[0])
            if len(different):
                # Facts of different kinds of evaluations cannot be compared.
                name = names[different[0]] if different[0] < len(names) else "facts"
                logger.error("rank %d: %s: %s", self._group.rank(), kind, dict(facts))
                raise RanksDisagreeError(
                    f"Step {rows[0][0]}, evaluation {rows[0][1]}: the {name} on rank {rank} "
                    "differs from that on rank 0, so their sums would be wrong, and the engine "
                    "ends; please report it with the lines above."
                )


def _digest(value: Any) -> int:
    """Return a number of 31 bits that is the same in every process."""
    if isinstance(value, np.ndarray):
        data = repr((value.shape, value.tolist())).encode()
    else:
        data = repr(value).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big") >> 1
