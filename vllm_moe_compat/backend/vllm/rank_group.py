"""The ranks of one engine: vLLM's process group, MLX's group over it, and the heartbeat.

vLLM's multiprocessing executor starts the ranks, on one machine or on several, and gives each its
number and an address to meet. vLLM's own groups carry Python objects only; all arrays go through
MLX's group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import psutil
import torch
from vllm.distributed import (
    ensure_model_parallel_initialized,
    get_world_group,
    init_distributed_environment,
)
from vllm.utils.network_utils import get_ip

from vllm_moe_compat.ranks.connect import Exchange, Place, connect
from vllm_moe_compat.ranks.heartbeat import Heartbeat

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class RankGroup:
    """A rank among the ranks of its engine.

    Attributes:
        place: its number, and where it is.
        group: MLX's group.
        exchange: tells the others an object.
        heartbeat: watches the others.
        source: the rank whose tokens, and whose output, count.
    """

    place: Place
    group: mx.distributed.Group
    exchange: Exchange
    heartbeat: Heartbeat
    source: int


def join(vllm_config: VllmConfig, rank: int, local_rank: int, init_method: str) -> RankGroup | None:
    """Meet the other ranks; all of them call it. None if there is only one.

    Args:
        vllm_config: of the engine.
        rank: of this worker, from 0.
        local_rank: of this worker on its machine.
        init_method: vLLM's address to meet at on one machine.

    Raises:
        CompatError: the ranks cannot connect.
    """
    parallel = vllm_config.parallel_config
    if parallel.world_size == 1:
        return None
    host = LOOPBACK if parallel.nnodes_within_dp == 1 else get_ip()
    _bind_gloo(host)
    init_distributed_environment(parallel.world_size, rank, init_method, local_rank, "gloo")
    ensure_model_parallel_initialized(
        parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    )
    place = Place(rank, parallel.world_size, local_rank, parallel.local_world_size, host)
    heartbeat = Heartbeat(place, _exchange)
    if mx.cuda.is_available() and mx.device_count(mx.gpu) > local_rank:
        mx.set_default_device(mx.Device(mx.gpu, local_rank))
    group = connect(place, _exchange)
    return RankGroup(
        place, group, _exchange, heartbeat, parallel.world_size - parallel.tensor_parallel_size
    )


def _exchange(own: Any) -> list[Any]:
    world = get_world_group()
    found: list[Any] = [None] * world.world_size
    torch.distributed.all_gather_object(found, own, group=world.cpu_group)
    return found


def _bind_gloo(host: str) -> None:
    """Have gloo use the interface of ``host`` only, unless the user named one."""
    interfaces = psutil.net_if_addrs().items()
    name = next((name for name, known in interfaces if any(x.address == host for x in known)), None)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
