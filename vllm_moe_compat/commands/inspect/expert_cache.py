"""What a cache of experts would hold, and how much memory that takes."""

from __future__ import annotations

from vllm_moe_compat.commands.inspect.model import CacheOption, ExpertCache
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.plan.estimate import Estimate
from vllm_moe_compat.plan.expert_cache import (
    OFF,
    CacheSetting,
    divide,
    full_bytes,
    least_bytes,
    parse,
    size_setting,
)
from vllm_moe_compat.plan.expert_layers import PlannedExperts, planned_experts
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.serving import installed_device

SHOWN = ("50%", "25%", "12.5%")
"""Settings that are shown beside the one in force and the smallest."""


def with_cache(planned: PlannedLoad, needs: Estimate, setting: str) -> Estimate | None:
    """Return what a load takes with the cache in force, if any; None if that is too small.

    Args:
        planned: a load without faults.
        needs: what it takes with all experts in memory.
        setting: a quantisation setting.
    """
    chosen = CacheSetting.read()
    if chosen is None:
        return needs
    try:
        experts = planned_experts(planned, setting, installed_device())
        cache = divide(experts.layers, experts.per_token, chosen)
    except CompatError:
        return None
    return experts.cached(needs, setting, cache)


def expert_cache(
    planned: PlannedLoad, needs: Estimate, total: int, free: int
) -> ExpertCache | None:
    """Describe the possible caches; None for a model without routed experts.

    Args:
        planned: a load without faults.
        needs: what it takes with all experts in memory.
        total: memory of this machine.
        free: memory that is free now.
    """
    setting = QUANTIZE.read()
    try:
        experts = planned_experts(planned, setting, installed_device())
    except CompatError as error:
        return ExpertCache(setting, 0, 0, 0, 0, 0, "", [], str(error))
    if not experts.layers:
        return None
    least = least_bytes(experts.layers, experts.per_token)
    smallest = size_setting(least)
    in_force = CacheSetting.read()
    options: list[CacheOption] = []
    for value in (OFF, *SHOWN, smallest):
        option = _option(experts, needs, setting, value, total, free)
        if option is not None and (not options or option.held < options[-1].held):
            options.append(option)
    if in_force is not None and in_force.words not in (option.setting for option in options):
        option = _option(experts, needs, setting, in_force.words, total, free)
        options += [] if option is None else [option]
        options.sort(key=lambda option: -option.held)
    return ExpertCache(
        quantize=setting,
        layers=len(experts.layers),
        experts=max(layer.experts for layer in experts.layers),
        per_token=experts.per_token,
        full=full_bytes(experts.layers),
        least=least,
        least_setting=smallest,
        options=options,
    )


def _option(
    experts: PlannedExperts, needs: Estimate, setting: str, value: str, total: int, free: int
) -> CacheOption | None:
    """Return the row of one value; None if it is too small for a token."""
    chosen = parse(value)
    held, slots = full_bytes(experts.layers), max(layer.experts for layer in experts.layers)
    if chosen is not None:
        try:
            cache = divide(experts.layers, experts.per_token, chosen)
        except CompatError:
            return None
        needs = experts.cached(needs, setting, cache)
        held, slots = cache.nbytes, min(cache.slots)
    final, peak = needs.final[setting], needs.peak[setting]
    return CacheOption(value, held, slots, final, peak, peak <= total, peak <= free)
