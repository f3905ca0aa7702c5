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

NO_TOKEN = -1
"""In place of the token of a request that failed."""


class RanksDisagreeError(RuntimeError):
    """A request failed on some ranks only."""


def tell(group: mx.distributed.Group, source: int, own: Sequence[int]) -> list[int]:
    """Return the tokens of rank ``source``; all ranks call it with as many tokens.

    Args:
        group: the ranks.
        source: the rank whose tokens count.
        own: ``[B]``, the tokens that this rank drew, ``NO_TOKEN`` for a request that failed.

    Raises:
        RanksDisagreeError: a request failed here and not on rank ``source``, or the reverse.
    """
    mine = np.asarray(own, dtype=np.int32)
    told = mx.array(mine if group.rank() == source else np.zeros_like(mine))
    tokens: list[int] = mx.distributed.all_sum(told, group=group).tolist()  # type: ignore[assignment]
    for one, other in zip(tokens, own, strict=True):
        if (one == NO_TOKEN) != (other == NO_TOKEN):
            raise RanksDisagreeError(
                f"a request failed on rank {group.rank() if other == NO_TOKEN else source} and not "
                f"on rank {source if other == NO_TOKEN else group.rank()}: the ranks computed "
                "different logits, so no rank can go on; please report it with the model's name."
            )
    return tokens
