"""Estimate the memory of loading and serving, and compare it with this machine's."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.commands.inspect.cache import cache
from vllm_moe_compat.commands.inspect.model import Memory, Need, Problem
from vllm_moe_compat.commands.inspect.problems import problem
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.load import context as loads
from vllm_moe_compat.load.memory import host_memory
from vllm_moe_compat.load.report import size
from vllm_moe_compat.plan.estimate import NONE, estimate
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.plan.planner import Plan

DTYPE = "BF16"


def memory(
    plans: Sequence[Plan],
    tensors: Mapping[str, TensorInfo],
    original: Mapping[str, Any],
    config: Mapping[str, Any],
    module: str | None,
) -> tuple[Memory, list[Problem]]:
    """Estimate the memory that each quantisation setting needs.

    Args:
        plans: without quantising and, if the checkpoint can be quantised, with it.
        tensors: what is loaded.
        original: the config as it was read.
        config: in mlx-lm's words.
        module: that will load it.
    """
    total, free = host_memory()
    spare = {
        setting: loads.spared_tensors(original, tensors, setting) for setting in QUANTIZE_SETTINGS
    }
    estimates = [estimate(plan, tensors, DTYPE, DTYPE, spare) for plan in plans]
    needs: list[Need] = []
    for setting in (NONE, *QUANTIZE_SETTINGS) if len(plans) > 1 else (NONE,):
        found = estimates[0 if setting == NONE else 1]
        final, peak = found.final[setting], found.peak[setting]
        needs.append(Need(setting, final, peak, peak <= total, peak <= free))
    kinds, note = cache(config, module)
    asked = "the host's memory, a container's limit counted"
    if sys.platform == "darwin":
        asked += "; what Metal lets one process use is less, and MLX was not asked"
    return Memory(DTYPE, needs, kinds, note, total, free, asked), _judge(needs, total)


def _judge(needs: list[Need], total: int) -> list[Problem]:
    setting = QUANTIZE.read()
    need = next((need for need in needs if need.setting == setting), None)
    if need is None:
        what = "the checkpoint is quantised already, or mlx-lm loads it without this package"
        return [
            problem(
                "quantized-already",
                f"{QUANTIZE.name}={setting} does not apply: {what}",
                f"unset {QUANTIZE.name}",
            )
        ]
    if need.fits:
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
