"""Estimate the memory of loading and serving, and compare it with this machine's."""

from __future__ import annotations

import sys

from vllm_moe_compat.commands.inspect.cache import cache
from vllm_moe_compat.commands.inspect.expert_cache import expert_cache, with_cache
from vllm_moe_compat.commands.inspect.model import Memory, Need, Problem
from vllm_moe_compat.commands.inspect.problems import problem
from vllm_moe_compat.dtypes import STORED_NAMES
from vllm_moe_compat.envs import EXPERT_CACHE, QUANTIZE
from vllm_moe_compat.families.fixes.windows import WindowFix, Windows
from vllm_moe_compat.families.row import Cache
from vllm_moe_compat.load.memory import host_memory
from vllm_moe_compat.load.report import size
from vllm_moe_compat.plan.estimate import Estimate, estimate
from vllm_moe_compat.plan.expert_cache import OFF
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.planner import Plan
from vllm_moe_compat.plan.serving import NONE


def memory(planned: PlannedLoad) -> tuple[Memory, list[Problem]]:
    """Estimate the memory that each quantisation setting needs, and the cache of a sequence."""
    total, free = host_memory()
    assert planned.layout is not None, "it was planned"
    tensors = planned.layout.tensors
    spare = {setting: planned.spared(setting) for setting in QUANTIZE_SETTINGS}
    dtype = STORED_NAMES[planned.serving.dtype]
    packed_dtype = STORED_NAMES[planned.serving.packed_dtype]
    settings = (NONE, *QUANTIZE_SETTINGS)
    whole = planned.plan_for(NONE) or Plan(planned.module, planned.layout.words)
    split = planned.plan_for(next(iter(QUANTIZE_SETTINGS)))
    needs: list[Need] = []
    uncached: Estimate | None = None
    for setting in settings if split is not None else (NONE,):
        plan = whole if setting == NONE or split is None else split
        found = estimate(plan, tensors, dtype, packed_dtype, spare)
        if setting == QUANTIZE.read():
            uncached = found
        if (kept := with_cache(planned, found, setting)) is None:
            continue
        final, peak = kept.final[setting], kept.peak[setting]
        needs.append(Need(setting, final, peak, peak <= total, peak <= free))
    facts = Cache() if planned.row is None else planned.row.cache
    kinds, note = cache(planned.config, facts, _windows(planned))
    source = "the host's memory, a container's limit counted"
    if sys.platform == "darwin":
        source += "; what Metal lets one process use is less, and MLX was not queried"
    experts = None if uncached is None else expert_cache(planned, uncached, total, free)
    found_memory = Memory(dtype, needs, kinds, note, total, free, source, experts)
    return found_memory, _compare(found_memory)


def _windows(planned: PlannedLoad) -> Windows:
    """Return the window of each layer where a fix decides about windows; else nothing."""
    fixes = () if planned.row is None else planned.row.fixes
    fix = next((fix for fix in fixes if isinstance(fix, WindowFix)), None)
    return () if fix is None else fix.in_force(planned.settings)


def _compare(memory: Memory) -> list[Problem]:
    setting, cache = QUANTIZE.read(), EXPERT_CACHE.read()
    need = next((need for need in memory.needs if need.setting == setting), None)
    if need is None or need.fits:
        return []
    smaller = [n.setting for n in memory.needs if n.fits and n.loading < need.loading]
    remedies = [f"{QUANTIZE.name}={smaller[0]}"] if smaller else []
    options = [] if memory.expert_cache is None else memory.expert_cache.options
    caches = [o.setting for o in options if o.fits and o.loading < need.loading]
    remedies += [f"{EXPERT_CACHE.name}={caches[0]}"] if caches else []
    kept = f" and {EXPERT_CACHE.name}={cache}" if cache != OFF else ""
    return [
        problem(
            "memory",
            f"loading takes {size(need.loading)} with {QUANTIZE.name}={setting}{kept}, more than "
            f"the {size(memory.machine_total)} that this machine has",
            f"set {' or '.join(remedies)}" if remedies else "use a larger machine",
        )
    ]
