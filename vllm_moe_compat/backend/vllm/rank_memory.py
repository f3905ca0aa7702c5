"""The ranks of one engine agree on what each may take of its machine's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_moe_compat.backend.vllm import data_parallel
from vllm_moe_compat.backend.vllm.local_engines import device_memory_for_all
from vllm_moe_compat.load.memory import device_memory

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_moe_compat.backend.vllm.rank_group import RankGroup


def device_memory_for_ranks(vllm_config: VllmConfig, ranks: RankGroup) -> tuple[int, int, int]:
    """Return total and free bytes of this rank's device, and how many processes share them.

    All ranks call it when the model is loaded. It is measured when all have loaded, and what is
    free is the least that a rank of the machine has seen, so those of one machine agree.
    """
    ranks.exchange("loaded")
    place = ranks.place
    if place.has_own_device:
        return *device_memory(), 1
    if place.local_rank == 0:
        total, free, engines = device_memory_for_all(vllm_config)
    else:
        (total, free), engines = device_memory(), 1
    found = ranks.exchange((total, free, engines))
    first = place.rank - place.local_rank
    here = found[first : first + place.local_size]
    return (
        min(total for total, _, _ in here),
        min(free for _, free, _ in here),
        max(engines for _, _, engines in here) * place.local_size,
    )


def processes_that_load(vllm_config: VllmConfig, ranks: RankGroup | None) -> int:
    """Return how many processes of this machine load into one device's memory while it starts."""
    if ranks is None:
        return data_parallel.local_engines(vllm_config)[1]
    return 1 if ranks.place.has_own_device else ranks.place.local_size
