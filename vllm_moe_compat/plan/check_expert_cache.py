"""Check that a load can keep experts on disk, if it is to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.errors import InsufficientMemoryError, UnsupportedCheckpointError
from vllm_moe_compat.plan.expert_cache import OFF, CacheSetting, divide
from vllm_moe_compat.plan.expert_layers import planned_experts
from vllm_moe_compat.plan.faults import Fault
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.serving import installed_device

ID = "expert-cache"


def with_cache_checked(planned: PlannedLoad) -> PlannedLoad:
    """Return the load, refused if its experts cannot stay on disk as the setting says."""
    if planned.faults or not (faults := tuple(check_expert_cache(planned))):
        return planned
    return replace(planned, plan=None, faults=faults)


def check_expert_cache(planned: PlannedLoad) -> Iterator[Fault]:
    """Yield a fault if experts cannot stay on disk, or too few of them fit into the cache.

    Args:
        planned: a load without other faults.
    """
    setting = CacheSetting.read()
    if setting is None or not planned.serving.experts_apart:
        return
    folder = planned.headers.folder
    try:
        experts = planned_experts(planned, planned.serving.setting, installed_device())
        divide(experts.layers, experts.per_token, setting)
    except UnsupportedCheckpointError as error:
        said = str(error).rstrip(".").partition(";")[0]
        yield Fault(
            ID,
            f"{folder}: {EXPERT_CACHE.name} is {setting.words}, and {said}",
            f"set {EXPERT_CACHE.name}={OFF}",
            UnsupportedCheckpointError,
        )
    except InsufficientMemoryError as error:
        message, _, remedy = str(error).rstrip(".").partition("; ")
        yield Fault(ID, f"{folder}: {message}", remedy, InsufficientMemoryError)
