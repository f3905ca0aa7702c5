"""The memory for pages, and how it is determined.

``--kv-cache-memory-bytes`` is taken as given. Otherwise the limit is ``--gpu-memory-utilization``
of the device's memory, or the memory free now if that is less, since the rest of the machine
shares it. Weights, a measured allowance for activations, and the states of as many sequences as
may run at once are subtracted. No more is taken than that many sequences of maximum length can
fill, plus a few with prefix caching: otherwise a server of one sequence at a time would have no
room to keep the prefix of another. The start-up line shows all parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from vllm_moe_compat.backend.pages.layers import StateLayer
from vllm_moe_compat.backend.pages.state_pool import StatePool
from vllm_moe_compat.backend.vllm.kv_specs import demand
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.load.memory import device_memory
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_moe_compat.backend.model.loader import ServedModel

# Tokens of the two passes that are measured; activations grow linearly between them.
MEASURED_TOKENS = (32, 96)
# Resident states may take this share of the memory left for caches.
STATE_SHARE = 0.5
# Sequences whose pages prefix caching may keep beside the running ones.
CACHED_SEQUENCES = 8


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes by purpose; ``page_bytes`` is reported to vLLM."""

    weights: int
    activations: int
    states: int
    sequences: int
    page_bytes: int
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


def measure(vllm_config: VllmConfig, served: ServedModel) -> Budget:
    """Compute the budget; lower ``max_num_seqs`` if the states would not fit.

    Raises:
        UnsupportedServingError: nothing is left for pages.
    """
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    stateful = [layer for layer in served.layers if isinstance(layer, StateLayer)]
    per_sequence = StatePool.bytes_per_sequence(stateful)
    activations = _activations(served, scheduler.max_num_batched_tokens)
    total, free = device_memory()
    explicit = int(cache.kv_cache_memory_bytes or 0)
    # An explicit size overrides the utilization, as elsewhere in vLLM.
    wanted = free if explicit else int(total * cache.gpu_memory_utilization) - served.weight_bytes
    bound = "--gpu-memory-utilization" if wanted <= free else "the memory free now"
    left = min(wanted, free) - activations - explicit
    if left <= 0:
        raise _nothing_left(vllm_config, served, total, free, activations)
    room = left if explicit else int(left * STATE_SHARE)
    sequences = scheduler.max_num_seqs
    if per_sequence and sequences * per_sequence > room:
        sequences = max(1, room // per_sequence)
        logger.warning(
            "--max-num-seqs lowered from %d to %d: the states of one sequence take %s and %s are "
            "left for states",
            scheduler.max_num_seqs,
            sequences,
            _mib(per_sequence),
            _mib(room),
        )
        scheduler.max_num_seqs = sequences
    states = sequences * per_sequence
    if explicit:
        page_bytes, reason = explicit, "--kv-cache-memory-bytes"
    else:
        cached = CACHED_SEQUENCES if cache.enable_prefix_caching else 0
        useful = demand(vllm_config, served.layers).bytes_for(sequences + cached)
        page_bytes, reason = left - states, f"limited by {bound}"
        if useful < page_bytes:
            page_bytes = useful
            length = vllm_config.model_config.max_model_len
            kept = f" and {cached} cached ones" if cached else ""
            reason = f"all that {sequences} sequences of {length} tokens{kept} can use"
    if page_bytes <= 0:
        raise _nothing_left(vllm_config, served, total, free, activations + states)
    return Budget(served.weight_bytes, activations, states, sequences, page_bytes, reason)


def _nothing_left(
    vllm_config: VllmConfig, served: ServedModel, total: int, free: int, working: int
) -> UnsupportedServingError:
    cache = vllm_config.cache_config
    share = cache.gpu_memory_utilization
    if cache.kv_cache_memory_bytes:
        allowed = f"--kv-cache-memory-bytes asks for {_mib(cache.kv_cache_memory_bytes)}"
    else:
        allowed = f"--gpu-memory-utilization {share} allows {_mib(int(total * share))}"
    return UnsupportedServingError(
        f"No memory is left for the KV cache: of {_mib(total)} ({_mib(free)} free) {allowed}, the "
        f"weights take {_mib(served.weight_bytes)}, activations and states {_mib(working)}; free "
        "memory, change that option, or lower --max-num-seqs or --max-num-batched-tokens."
    )


def _activations(served: ServedModel, tokens: int) -> int:
    """Return the peak bytes of a prefill of ``tokens``, extrapolated from two short ones.

    The model's head is not computed, as in every prefill.
    """
    from mlx_lm.models.cache import make_prompt_cache

    peaks = []
    for count in MEASURED_TOKENS:
        caches = make_prompt_cache(served.model)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        served.model(mx.zeros((1, count), dtype=mx.int32), cache=caches)
        mx.eval([cache.state for cache in caches])
        peaks.append(int(mx.get_peak_memory()) - int(before))
        del caches
    (short, long), (low, high) = MEASURED_TOKENS, peaks
    slope = max(0.0, (high - low) / (long - short))
    return math.ceil(high + slope * max(0, tokens - long))
