"""Estimate the memory of loading and serving, and compare it with this machine's."""

from __future__ import annotations

import sys

from vllm_moe_compat.commands.inspect.cache import cache
from vllm_moe_compat.commands.inspect.model import Memory, Need, Problem
from vllm_moe_compat.commands.inspect.problems import problem
from vllm_moe_compat.dtypes import STORED_NAMES
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.families.fixes.windows import WindowFix, Windows
from vllm_moe_compat.families.row import Cache
from vllm_moe_compat.load.memory import host_memory
from vllm_moe_compat.load.report import size
from vllm_moe_compat.plan.estimate import estimate
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
    for setting in settings if split is not None else (NONE,):
        plan = whole if setting == NONE or split is None else split
        found = estimate(plan, tensors, dtype, packed_dtype, spare)
        final, peak = found.final[setting], found.peak[setting]
        needs.append(Need(setting, final, peak, peak <= total, peak <= free))
    facts = Cache() if planned.row is None else planned.row.cache
    kinds, note = cache(planned.config, facts, _windows(planned))
    source = "the host's memory, a container's limit counted"
    if sys.platform == "darwin":
        source += "; what Metal lets one process use is less, and MLX was not queried"
    return Memory(dtype, needs, kinds, note, total, free, source), _compare(needs, total)


def _windows(planned: PlannedLoad) -> Windows:
    """Return the window of each layer where a fix decides about windows; else nothing."""
    fixes = () if planned.row is None else planned.row.fixes
    fix = next((fix for fix in fixes if isinstance(fix, WindowFix)), None)
    return () if fix is None else fix.in_force(planned.settings)


def _compare(needs: list[Need], total: int) -> list[Problem]:
    setting = QUANTIZE.read()
    need = next((need for need in needs if need.setting == setting), None)
    if need is None or need.fits:
        return []
    smaller = [n.setting for n in needs if n.fits and n.loading < need.loading]
    return [
        problem(
            "memory",
            f"loading takes {size(need.loading)} with {QUANTIZE.name}={setting}, more than the "
            f"{size(total)} that this machine has",
            f"set {QUANTIZE.name}={smaller[0]}" if smaller else "use a larger machine",
        )
    ]
