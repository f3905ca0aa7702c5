"""The memory for pages, and how it is determined.

``--kv-cache-memory-bytes`` and ``--gpu-memory-utilization`` mean what they say, and a WARNING
follows if they leave the machine less than its reserve (``load/memory.py``). Without either, pages
take at most half of what weights, activations and states leave free, and never the reserve.

Weights, an estimate of activations, and the states of as many sequences as may run at once are
subtracted. No more is taken than that many sequences of maximum length can fill, plus a few with
prefix caching: otherwise a server of one sequence at a time would have no room to keep the prefix
of another. The start-up line shows all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_moe_compat.backend.model import activations
from vllm_moe_compat.backend.pages.layers import Layer, StateLayer
from vllm_moe_compat.backend.pages.state_pool import StatePool
from vllm_moe_compat.backend.vllm import bridge, draft_memory
from vllm_moe_compat.backend.vllm.kv_specs import demand
from vllm_moe_compat.backend.vllm.local_engines import device_memory_for_all
from vllm_moe_compat.backend.vllm.rank_memory import device_memory_for_ranks
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.load.memory import reserve
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_moe_compat.backend.model.loader import ServedModel
    from vllm_moe_compat.backend.vllm.rank_group import RankGroup

# Pages may take this share of what is free, where nothing says how much.
DEFAULT_SHARE = 0.5
# Resident states may take this share of the memory left for caches.
STATE_SHARE = 0.5
# Sequences whose pages prefix caching may keep beside the running ones.
CACHED_SEQUENCES = 8
MORE = "--gpu-memory-utilization or --kv-cache-memory-bytes"


@dataclass(frozen=True, slots=True)
class Demands:
    """What a server needs and is allowed, in bytes where nothing else is said.

    Attributes:
        weights: they are loaded, so free memory is without them.
        activations: of the largest pass.
        per_sequence: states of one sequence.
        sequences: that may run at once.
        length: tokens of the longest sequence.
        cached: sequences whose pages prefix caching may keep beside the running ones.
        pages_for: the pages that a number of such sequences can use.
        page_bytes: ``--kv-cache-memory-bytes``, or 0.
        share: ``--gpu-memory-utilization``, or None if it was not given.
    """

    weights: int
    activations: int
    per_sequence: int
    sequences: int
    length: int
    cached: int
    pages_for: Callable[[int], int]
    page_bytes: int
    share: float | None


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes by purpose; ``page_bytes`` is reported to vLLM, ``spare`` stays free."""

    weights: int
    activations: int
    states: int
    sequences: int
    page_bytes: int
    spare: int
    reason: str

    def __str__(self) -> str:
        parts = [f"{_mib(self.page_bytes)} for pages ({self.reason})"]
        if self.states:
            parts.append(f"{_mib(self.states)} for the states of {self.sequences} sequences")
        parts.append(f"{_mib(self.weights)} weights")
        parts.append(f"{_mib(self.activations)} activations")
        return ", ".join(parts)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def measure(
    vllm_config: VllmConfig,
    served: ServedModel,
    all_layers: Sequence[Layer] | None = None,
    ranks: RankGroup | None = None,
) -> Budget:
    """Compute the budget; lower ``max_num_seqs`` if the states would not fit.

    ``all_layers`` are those of all stages of a pipeline, of which ``served`` is one. ``ranks``
    agree on the budget; all of them call this.

    Raises:
        UnsupportedServingError: nothing is left for pages.
    """
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    stateful = [layer for layer in served.layers if isinstance(layer, StateLayer)]
    longest = vllm_config.model_config.max_model_len
    drafts = draft_memory.measure(vllm_config, served)
    per_sequence = StatePool.bytes_per_sequence(stateful) * drafts.states
    tokens = scheduler.max_num_batched_tokens
    working = activations.measure(served.model, served.layers, tokens, longest)
    working += drafts.activations
    demands = Demands(
        weights=served.weight_bytes + served.head_bytes,
        activations=working,
        per_sequence=per_sequence,
        sequences=scheduler.max_num_seqs,
        length=longest,
        cached=CACHED_SEQUENCES if cache.enable_prefix_caching else 0,
        pages_for=lambda count: demand(vllm_config, all_layers or served.layers).bytes_for(count),
        page_bytes=int(cache.kv_cache_memory_bytes or 0),
        share=bridge.given_memory_share(vllm_config),
    )
    if ranks is None:
        total, free, engines = device_memory_for_all(vllm_config)
    else:
        total, free, engines = device_memory_for_ranks(vllm_config, ranks)
    budget = divide(total, free, demands, engines)
    if ranks is not None:
        # They may have other activations; the engine has one number of sequences.
        least = min(ranks.exchange(budget.sequences))
        budget = divide(total, free, replace(demands, sequences=least), engines)
    if budget.sequences < scheduler.max_num_seqs:
        logger.warning(
            "--max-num-seqs lowered from %d to %d: the states of one sequence take %s and %s are "
            "left for states",
            scheduler.max_num_seqs,
            budget.sequences,
            _mib(per_sequence),
            _mib(budget.states),
        )
        scheduler.max_num_seqs = budget.sequences
    keep = reserve(total) // engines
    if budget.spare < keep and (demands.page_bytes or demands.share is not None):
        logger.warning(
            "%s leaves %s of %s %s free when the pages fill, less than %s: expect "
            "swapping or an out-of-memory kill; lower it, or leave it out",
            _asked(demands),
            _mib(budget.spare),
            "this machine's" if engines == 1 else "its share,",
            _mib(total // engines),
            _mib(keep),
        )
    return budget


def divide(total: int, free: int, demands: Demands, engines: int = 1) -> Budget:
    """Divide the memory of a machine with ``total`` bytes, of which ``free`` are free now.

    ``engines`` (or ranks) with the same demands share the machine, its reserve, and what is free;
    the result is that of one.

    Raises:
        UnsupportedServingError: nothing is left for pages.
    """
    keep = reserve(total) // engines
    total, free = total // engines, free // engines
    left = free - demands.activations
    bound = "the memory free now"
    if demands.page_bytes:
        # An explicit size overrides the utilization, as elsewhere in vLLM.
        left -= demands.page_bytes
        room = left
    elif demands.share is not None:
        allowed = int(total * demands.share) - demands.weights - demands.activations
        if allowed <= left:
            left, bound = allowed, "--gpu-memory-utilization"
        room = int(left * STATE_SHARE)
    else:
        left -= keep
        room = int(left * STATE_SHARE)
    if left <= 0:
        raise _nothing_left(total, free, demands, demands.activations, engines)
    sequences = demands.sequences
    if demands.per_sequence and sequences * demands.per_sequence > room:
        sequences = max(1, room // demands.per_sequence)
    states = sequences * demands.per_sequence
    if demands.page_bytes:
        pages, reason = demands.page_bytes, "--kv-cache-memory-bytes"
    else:
        pages, reason = left - states, f"limited by {bound}"
        if demands.share is None:
            reason = f"all but {_mib(keep)}, which the machine keeps; for more: {MORE}"
            half = int((left + keep - states) * DEFAULT_SHARE)
            if half < pages:
                pages, reason = half, f"half of the memory free now; for more: {MORE}"
        useful = demands.pages_for(sequences + demands.cached)
        if useful < pages:
            pages = useful
            kept = f" and {demands.cached} cached ones" if demands.cached else ""
            reason = f"all that {sequences} sequences of {demands.length} tokens{kept} can use"
    if pages <= 0:
        raise _nothing_left(total, free, demands, demands.activations + states, engines)
    if engines > 1:
        reason += f"; {engines} processes share this machine"
    spare = free - demands.activations - states - pages
    return Budget(demands.weights, demands.activations, states, sequences, pages, spare, reason)


def _asked(demands: Demands) -> str:
    if demands.page_bytes:
        return f"--kv-cache-memory-bytes {demands.page_bytes}"
    return f"--gpu-memory-utilization {demands.share}"


def _nothing_left(
    total: int, free: int, demands: Demands, working: int, engines: int
) -> UnsupportedServingError:
    remedy = "free memory, change that option, or lower"
    if demands.page_bytes:
        allowed = f"--kv-cache-memory-bytes asks for {_mib(demands.page_bytes)}"
    elif demands.share is not None:
        share = int(total * demands.share)
        allowed = f"--gpu-memory-utilization {demands.share} allows {_mib(share)}"
    else:
        allowed = f"{_mib(reserve(total * engines) // engines)} are kept for the machine"
        remedy = f"free memory, set {MORE} to use what is kept, or lower"
    each = f", a share of {engines}," if engines > 1 else ""
    return UnsupportedServingError(
        f"No memory is left for the KV cache: of {_mib(total)}{each} ({_mib(free)} free) "
        f"{allowed}, the weights take {_mib(demands.weights)}, activations and states "
        f"{_mib(working)}; {remedy} "
        "--max-num-seqs or --max-num-batched-tokens."
    )
