"""Memory of the device on which MLX allocates, and the check that a load fits it.

A load whose weights exceed the total memory is refused, since closing other programs would not
help. A load that only exceeds the free memory causes a warning, since free memory is an estimate:
other programs start and end, and caches shrink. So does one that leaves the machine too little.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

from vllm_moe_compat.envs import EXPERT_CACHE, QUANTIZE
from vllm_moe_compat.errors import InsufficientMemoryError
from vllm_moe_compat.load import cgroups, claims
from vllm_moe_compat.load.report import size
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan.estimate import Estimate
from vllm_moe_compat.plan.expert_cache import OFF, CacheSetting

# What the rest of the machine needs: the larger of these bytes and this share of the total.
RESERVED_BYTES = 2 << 30
RESERVED_SHARE = 0.1


def reserve(total: int) -> int:
    """Return the bytes that are left to the rest of a machine, or container, of ``total``."""
    return max(RESERVED_BYTES, int(total * RESERVED_SHARE))


def device_memory() -> tuple[int, int]:
    """Return total and free bytes of the device on which MLX allocates."""
    import mlx.core as mx

    total, free = host_memory()
    info: dict[str, Any] = mx.device_info()
    if mx.default_device().type == mx.DeviceType.gpu:
        own = int(info.get("max_recommended_working_set_size") or info.get("memory_size") or 0)
        if own:
            # Metal shares the host's memory; a CUDA device has its own.
            left = info.get("free_memory")
            if left is None:
                left = min(max(0, own - int(mx.get_active_memory())), free)
            return own, int(left)
    return total, free


def host_memory() -> tuple[int, int]:
    """Return total and free bytes of the host, or of the container if its limit is lower.

    What engines of this user hold and have not touched yet is not free.
    """
    try:
        import psutil

        host = psutil.virtual_memory()
        total, free = int(host.total), int(host.available)
        claimed = claims.outstanding()
    except ImportError:
        # psutil is a dependency of vLLM, but not of mlx-lm.
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free, claimed = total, 0
    if (limit := cgroups.limits()) is not None:
        total, free = min(total, limit[0]), min(free, limit[1])
    return total, max(0, free - claimed)


def give_back() -> None:
    """Return freed memory to the operating system.

    MLX keeps freed buffers for later, and so does glibc: after a load, or the end of an engine,
    hundreds of MiB would stay with the process.
    """
    import mlx.core as mx

    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # Of glibc only.
    if trim is not None:
        trim(0)


def check(
    path: object,
    needs: Estimate,
    setting: str,
    cache: str = OFF,
    cache_within: Callable[[int], CacheSetting | None] = lambda limit: None,
    processes: int = 1,
) -> None:
    """Refuse a load that exceeds the total memory; warn if it leaves the machine too little.

    Args:
        path: the checkpoint, for the message.
        needs: memory that loading takes, by quantisation setting.
        setting: the quantisation setting in force.
        cache: the setting of the expert cache in force.
        cache_within: returns the largest cache with which the load takes so many bytes at most,
            or None where there is no such cache.
        processes: the number of processes of this machine that load as much at the same time.

    Raises:
        InsufficientMemoryError: the weights alone are larger than the total memory.
    """
    total, free = (amount // processes for amount in device_memory())
    final, peak = needs.final[setting], needs.peak[setting]
    given = f"{QUANTIZE.name}={setting}"
    given += f" and {EXPERT_CACHE.name}={cache}" if cache != OFF else ""
    if final > total:
        raise InsufficientMemoryError(
            f"{path}: the weights take {size(final)} ({size(peak)} while loading) with {given}, "
            f"more than the {size(total)} that this machine has{_each(processes)}; "
            f"{_advice(needs, total, setting, cache_within(total))}."
        )
    # A small load does not warn of a machine that is nearly full anyway.
    keep = min(reserve(total * processes) // processes, free // 2)
    if free - peak >= keep:
        return
    if peak > free:
        expected, limit = "expect swapping or an out-of-memory kill", free
    else:
        expected, limit = f"less than {size(keep)} are left to the machine", free - keep
    logger.warning(
        "%s: loading takes %s with %s, and %s of %s are free%s: %s; close other programs, or %s",
        path,
        size(peak),
        given,
        size(free),
        size(total),
        _each(processes),
        expected,
        _advice(needs, limit, setting, cache_within(limit)),
    )


def _each(processes: int) -> str:
    return f" for each of {processes} processes that load at once" if processes > 1 else ""


def _advice(needs: Estimate, limit: int, setting: str, cache: CacheSetting | None) -> str:
    smaller = [s for s in needs.fitting(limit) if needs.peak[s] < needs.peak[setting]]
    ways = []
    if smaller:
        ways.append(f"{QUANTIZE.name}={smaller[0]}, which takes {size(needs.peak[smaller[0]])}")
    if cache is not None:
        ways.append(f"{EXPERT_CACHE.name}={cache.words}, which leaves the other experts on disk")
    if ways:
        return f"set {', or '.join(ways)}"
    least = min(needs.peak, key=needs.peak.__getitem__)
    return f"use a smaller model, since even {least} takes {size(needs.peak[least])}"
