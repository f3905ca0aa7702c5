"""All experts of a model whose experts are on disk, for those who ask for the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vllm_moe_compat.expert_cache.cached_experts import CachedExperts
from vllm_moe_compat.expert_cache.install import containers
from vllm_moe_compat.expert_cache.protocol import Bytes
from vllm_moe_compat.expert_cache.read_tasks import end_threads


def parameters(model: nn.Module) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    """Return the shape ``[E, …]`` and dtype of each parameter of experts on disk, by its path."""
    return {
        f"{one.layer}.{name}": ((one.experts, *spec.shape), spec.dtype)
        for one in containers(model)
        for name, spec in one.source.specs.items()
    }


def experts(container: CachedExperts) -> Iterator[dict[str, Bytes]]:
    """Yield the parameters of every expert of a container in turn, read anew into the same memory.

    Raises:
        CompatError: an expert cannot be read.
    """
    source = container.source
    held = {
        name: np.empty(math.prod(spec.shape) * spec.dtype.size, np.uint8)
        for name, spec in source.specs.items()
    }
    for expert in range(source.experts):
        for error in source.read([expert], lambda _: held).values():
            raise error
        yield held


def close(model: nn.Module) -> None:
    """Give the slots, files and threads of a model back; its experts cannot be called then."""
    for one in containers(model):
        one.close()
    end_threads()
