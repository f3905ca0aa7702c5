"""All ranks go on with the same tokens: those of one rank, told to the others.

Every rank has the whole logits and draws by itself, from the same seeds, so the tokens are the
same already where sums over the ranks have the same bits on all of them. That is not promised for
every collective, and ranks that go on with different tokens would add the layers of different
sequences without an error. So in each step one rank's tokens are told, by a sum to which the
others add zeros: it is one collective more, after all collectives of the step and before those of
the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

_NO_TOKEN = -1


class RanksDisagreeError(RuntimeError):
    """A request failed on some ranks only."""


def tell(
    group: mx.distributed.Group, source: int, own: Sequence[Sequence[int]], most: int = 1
) -> list[list[int]]:
    """Return the tokens of rank ``source``; all ranks call it for as many requests.

    Args:
        group: the ranks.
        source: the rank whose tokens count.
        own: the tokens that this rank drew for each request, none for one that failed.
        most: tokens of a request at most, the same on all ranks.

    Raises:
        RanksDisagreeError: a request failed here and not on rank ``source``, or the reverse.
    """
    mine = np.full((len(own), most), _NO_TOKEN, dtype=np.int32)
    for row, tokens in enumerate(own):
        mine[row, : len(tokens)] = tokens
    sent = mx.array(mine if group.rank() == source else np.zeros_like(mine))
    rows: list[list[int]] = mx.distributed.all_sum(sent, group=group).tolist()  # type: ignore[assignment]
    told = [[token for token in row if token != _NO_TOKEN] for row in rows]
    for one, other in zip(told, own, strict=True):
        if bool(one) != bool(other):
            raise RanksDisagreeError(
                f"a request failed on rank {source if other else group.rank()} and not "
                f"on rank {group.rank() if other else source}: the ranks computed "
                "different logits, so no rank can go on; please report it with the model's name."
            )
    return told
