"""Say at start-up what a cache of experts may cost with so many sequences."""

from __future__ import annotations

from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.load.report import size
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan.expert_cache import CachePlan


def warn_of_reads(cache: CachePlan | None, sequences: int) -> None:
    """Warn if one token of each sequence may need more experts than a layer has slots for.

    Args:
        cache: the slots of each layer; None if all experts are in memory.
        sequences: that may run at once.
    """
    if cache is None or cache.all_resident:
        return
    slots, fitting = min(cache.slots), min(cache.slots) // cache.per_token
    if sequences <= fitting:
        return
    logger.warning(
        "%d sequences at once may need %d experts of a layer, and %s=%s holds %d: every pass may "
        "then read up to %d experts in %d layers (%s) from disk; --max-num-seqs %d needs no more "
        "than it holds, and a larger cache reads less",
        sequences,
        min(sequences * cache.per_token, max(layer.experts for layer in cache.layers)),
        EXPERT_CACHE.name,
        EXPERT_CACHE.read(),
        slots,
        cache.misses_per_pass(sequences),
        len(cache.layers),
        size(cache.read_per_pass(sequences)),
        fitting,
    )
