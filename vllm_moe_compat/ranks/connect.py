"""MLX's group of the ranks that compute one model together.

Each rank knows its number, the number of ranks and a way to tell the others something
(``Exchange``, in vLLM its own process group). Addresses are exchanged that way, and MLX connects:
``ring`` over TCP is in every MLX, the others need hardware or a launcher.

MLX reads its settings from the environment and from a file; both are set for the moment of
connecting only. A port is reserved until MLX listens on it, with ``SO_REUSEPORT``, which MLX sets
too: no other program gets it in between.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from vllm_moe_compat.envs import COLLECTIVES
from vllm_moe_compat.errors import SettingError
from vllm_moe_compat.log import logger

Exchange = Callable[[Any], list[Any]]
"""Tells the other ranks an object; returns those of all ranks, by rank. All ranks call it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's place among the others.

    Attributes:
        rank: from 0.
        size: number of ranks.
        local_rank: among the ranks of this machine.
        local_size: number of ranks on this machine.
        host: the address at which the others reach this machine, and at which it listens.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str

    @property
    def has_own_device(self) -> bool:
        """Whether each rank of this machine computes on a CUDA device of its own."""
        return bool(mx.cuda.is_available()) and mx.device_count(mx.gpu) >= self.local_size


def connect(place: Place, exchange: Exchange) -> mx.distributed.Group:
    """Connect the ranks; all of them call it.

    Raises:
        SettingError: MLX does not have the collectives that were asked for, or the ranks differ
            in what they choose.
        RuntimeError: MLX cannot connect.
    """
    chosen = _choose(place)
    choices = exchange(chosen)
    if len(set(choices)) > 1:
        listed = ", ".join(f"rank {rank} {choice}" for rank, choice in enumerate(choices))
        raise SettingError(
            f"The ranks choose different collectives ({listed}); set {COLLECTIVES.name} to the "
            "same value on all machines."
        )
    with ExitStack() as stack:
        settings = {"MLX_RANK": str(place.rank), "MLX_WORLD_SIZE": str(place.size)}
        if chosen == "ring":
            settings["MLX_HOSTFILE"] = stack.enter_context(_hostfile(place, exchange))
        elif chosen != "mpi":
            address, port = stack.enter_context(_reserved(place.host)), 0
            address, port = exchange(address)[0]
            settings["MLX_JACCL_COORDINATOR"] = f"{address}:{port}"
            settings |= {"NCCL_HOST_IP": address, "NCCL_PORT": str(port)}
        stack.enter_context(_environment(settings))
        group = mx.distributed.init(strict=True, backend=chosen)
    if (group.rank(), group.size()) != (place.rank, place.size):
        raise SettingError(
            f"{COLLECTIVES.name}={chosen}: MLX says that this is rank {group.rank()} of "
            f"{group.size()}, and vLLM that it is rank {place.rank} of {place.size}; use ring."
        )
    logger.info("rank %d of %d, %s collectives at %s", place.rank, place.size, chosen, place.host)
    return group


def _choose(place: Place) -> str:
    """Return the collectives to use.

    Raises:
        SettingError: those that were asked for do not exist here.
    """
    wanted = COLLECTIVES.read()
    if wanted == "auto":
        if place.has_own_device and _has("nccl"):
            return "nccl"
        rdma = mx.metal.is_available() and bool(os.environ.get("MLX_IBV_DEVICES"))
        return "jaccl" if rdma and _has("jaccl") else "ring"
    if not _has(wanted):
        found = [name for name in COLLECTIVES.choices[1:] if _has(name)]
        raise SettingError(
            f"{COLLECTIVES.name}={wanted}: this MLX does not have it; it has {', '.join(found)}."
        )
    if wanted == "nccl" and not place.has_own_device:
        raise SettingError(
            f"{COLLECTIVES.name}=nccl: {place.local_size} ranks on this machine need as many CUDA "
            "devices; use ring, or fewer ranks."
        )
    if wanted == "jaccl" and not os.environ.get("MLX_IBV_DEVICES"):
        raise SettingError(
            f"{COLLECTIVES.name}=jaccl: MLX_IBV_DEVICES is not set; it names the file that lists "
            "the RDMA device of each pair of machines, which mlx.distributed_config writes."
        )
    return wanted


def _has(name: str) -> bool:
    return bool(mx.distributed.is_available(backend=name))


@contextmanager
def _reserved(host: str) -> Iterator[tuple[str, int]]:
    """Reserve a free port of ``host`` for a program of this user that sets ``SO_REUSEPORT``."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
        yield host, reserved.getsockname()[1]


@contextmanager
def _hostfile(place: Place, exchange: Exchange) -> Iterator[str]:
    """Write MLX's file of the addresses of all ranks, readable by this user only."""
    with _reserved(place.host) as (host, port):
        addresses = [[address] for address in exchange(f"{host}:{port}")]
        with tempfile.NamedTemporaryFile("w", prefix="ranks", suffix=".json") as file:
            json.dump(addresses, file)
            file.flush()
            yield file.name


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
