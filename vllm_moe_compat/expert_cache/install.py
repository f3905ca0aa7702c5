"""Take the experts out of a load, and put containers with slots into the model.

``sanitize`` has named the builds. Those of a container of experts stay undone; each can be made
for one expert when it is needed. A container's layers get the classes and dtypes that they would
have in a whole load: upstream's quantised class where the weights are packed, then whatever
``settle`` does to the layers of a served model. Layers whose experts all fit are loaded as usual.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.checkpoint.operations import MlxFormat, Spec
from vllm_moe_compat.dtypes import mlx_dtype, nbytes, stored_name
from vllm_moe_compat.errors import InsufficientMemoryError, UnsupportedCheckpointError
from vllm_moe_compat.execute.quantize import PackedBuild, SanitizedLoad
from vllm_moe_compat.execute.stored_tensors import StoredTensors
from vllm_moe_compat.expert_cache.cached_experts import CachedExperts
from vllm_moe_compat.expert_cache.protocol import Spec as SlotSpec
from vllm_moe_compat.expert_cache.slots import Pending
from vllm_moe_compat.expert_cache.source import FileSource
from vllm_moe_compat.families.global_scale import take_global_scale
from vllm_moe_compat.plan.expert_cache import CachePlan, CacheSetting, ExpertLayer, divide
from vllm_moe_compat.plan.packing import Requantize

CONTAINERS = (SwitchGLU, SwitchMLP)
_MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
"""Bits and group → mode, of packed weights whose scales are bytes."""


def containers(model: nn.Module) -> list[CachedExperts]:
    """Return the containers with slots in a model."""
    return [module for _, module in model.named_modules() if isinstance(module, CachedExperts)]


@dataclass(frozen=True, slots=True)
class _Found:
    """A container whose experts can be read one by one.

    Attributes:
        path: in the model.
        container: with layers of one row each, in their final classes and dtypes.
        builds: of its parameters.
        layer: for the division of the cache.
    """

    path: str
    container: nn.Module
    builds: tuple[PackedBuild, ...]
    layer: ExpertLayer


def install(
    sanitized: SanitizedLoad,
    model: nn.Module,
    stored: StoredTensors,
    setting: CacheSetting,
    per_token: int,
    settle: Callable[[nn.Module], None] | None = None,
    *,
    partial: bool = False,
) -> CachePlan:
    """Take the builds of experts out of ``sanitized``, and replace the containers of ``model``.

    Args:
        sanitized: with a complete plan; only the builds of other tensors remain.
        model: the instance, neither quantised nor loaded.
        stored: the checkpoint's files.
        setting: the size of the cache.
        per_token: experts that one token needs.
        settle: changes classes and dtypes of a module's layers, as for the served model.
        partial: whether the files may lack layers; their containers stay as they are.

    Returns:
        The slots of each layer.

    Raises:
        InsufficientMemoryError: the cache is too small for one token.
        UnsupportedCheckpointError: an expert cannot be made by itself.
    """
    found = list(_find(sanitized, model, settle, partial))
    if not found:
        raise UnsupportedCheckpointError(
            f"{stored.folder}: {type(model).__module__} has no experts of the kind that a cache "
            "can hold (SwitchGLU or SwitchMLP); set VLLM_MOE_COMPAT_EXPERT_CACHE=off."
        )
    if cut := next((one.path for one in found if any(any(b.cuts) for b in one.builds)), None):
        raise UnsupportedCheckpointError(
            f"{stored.folder}: {cut} has values that each rank makes from whole tensors, such as "
            "a bias, and no single expert of them can be read; set "
            "VLLM_MOE_COMPAT_EXPERT_CACHE=off, or use tensor_parallel_size 1."
        )
    try:
        plan = divide([one.layer for one in found], per_token, setting)
    except InsufficientMemoryError as error:
        raise InsufficientMemoryError(f"{stored.folder}: {error}") from error
    pending = Pending()
    modules = dict(model.named_modules())
    for one, slots in zip(found, plan.slots, strict=True):
        if slots >= one.layer.experts:
            continue
        for packed in one.builds:
            sanitized.builds.remove(packed)
            for name in packed.build.sources:
                sanitized.sources.pop(name, None)
            for name in packed.names:
                sanitized.floats.pop(name, None)
        specs = {
            name: SlotSpec(tuple(array.shape[1:]), array.dtype, _rounded(one.container, name))
            for name, array in tree_flatten(one.container.parameters())
            if _is_of_expert(one.container, name)
        }
        source = FileSource(stored, one.path, one.builds, specs)
        cached = CachedExperts(one.container, source, slots, layer=one.path, pending=pending)
        parent, _, name = one.path.rpartition(".")
        setattr(modules[parent], name, cached)
    return plan


def _find(
    sanitized: SanitizedLoad,
    model: nn.Module,
    settle: Callable[[nn.Module], None] | None,
    partial: bool,
) -> Iterator[_Found]:
    for path, container in model.named_modules():
        if not isinstance(container, CONTAINERS):
            continue
        builds = tuple(
            packed
            for packed in sanitized.builds
            if all(name.startswith(f"{path}.") for name in packed.names)
        )
        if partial and not builds:
            continue
        made = {
            name.removeprefix(f"{path}."): spec
            for packed in builds
            for name, spec in _made(packed, sanitized)
        }
        experts = _expert_count(container)
        skeleton = _skeleton(container, made)
        wanted = {n for n, _ in tree_flatten(skeleton.parameters()) if _is_of_expert(skeleton, n)}
        if missing := sorted(wanted - made.keys()):
            raise UnsupportedCheckpointError(
                f"{type(model).__module__}: {fold([f'{path}.{n}' for n in missing])} cannot be "
                "made for one expert alone, where each of its experts was expected to be in the "
                "files by itself; set VLLM_MOE_COMPAT_EXPERT_CACHE=off."
            )
        if settle is not None:
            settle(skeleton)
        held = sum(
            array.nbytes
            for name, array in tree_flatten(skeleton.parameters())
            if _is_of_expert(skeleton, name)
        )
        tensors = sanitized.load.tensors
        read = sum(
            nbytes(tensors[name].dtype, tensors[name].shape)
            for packed in builds
            for name in packed.build.sources
        )
        yield _Found(path, skeleton, builds, ExpertLayer(path, experts, held * experts, read))


def _made(packed: PackedBuild, sanitized: SanitizedLoad) -> Iterator[tuple[str, Spec]]:
    """Yield name and spec ``[E, …]`` of each parameter that a build makes."""
    dtype = stored_name(packed.dtype) if packed.dtype else "BF16"
    specs = packed.build.results(sanitized.load.tensors, dtype)
    formats = (*packed.formats, *[None] * len(specs))
    for name, spec, packing in zip(packed.names, specs, formats, strict=False):
        root = name.removesuffix(".weight")
        match packing:
            case Requantize():
                parts = packing.tensors(spec)
            case MlxFormat():
                parts = packing.tensors(spec.shape)
            case _:
                yield name, spec
                continue
        for kind, part in parts.items():
            yield f"{root}.{kind}", part


def _skeleton(container: nn.Module, made: Mapping[str, Spec]) -> nn.Module:
    """Return a copy whose layers have one expert each, of zeros, in the made classes and dtypes."""
    skeleton = copy.copy(container)
    for name, layer in container.items():
        if not isinstance(layer, SwitchLinear):
            continue
        one: Any = copy.copy(layer)
        _, rows, columns = layer.weight.shape
        one.weight = mx.zeros((1, rows, columns), dtype=mx.bfloat16)
        if (scales := made.get(f"{name}.scales")) is not None:
            if f"{name}.global_scale" in made:
                take_global_scale(one)
            one = one.to_quantized(**_format(made, name, columns, scales))
        for key in list(one.keys()):
            if (spec := made.get(f"{name}.{key}")) is not None:
                one[key] = mx.zeros((1, *spec.shape[1:]), dtype=mlx_dtype(spec.dtype))
        skeleton[name] = one
    return skeleton


def _format(made: Mapping[str, Spec], name: str, columns: int, scales: Spec) -> dict[str, Any]:
    """Return the arguments of ``to_quantized`` for packed words of these shapes."""
    bits = 32 * made[f"{name}.weight"].shape[-1] // columns
    group = columns // scales.shape[-1]
    mode = "affine" if f"{name}.biases" in made else _MODES[bits, group]
    return {"group_size": group, "bits": bits, "mode": mode}


def _expert_count(container: nn.Module) -> int:
    layers = [layer for layer in container.values() if isinstance(layer, SwitchLinear)]
    return int(layers[0].weight.shape[0])


def _is_of_expert(container: nn.Module, name: str) -> bool:
    """Whether a parameter is one of a layer of experts, and so has an axis of experts."""
    return isinstance(container[name.partition(".")[0]], SwitchLinear | QuantizedSwitchLinear)


def _rounded(container: nn.Module, name: str) -> mx.Dtype | None:
    """Return the dtype that a weight was widened from for the device's sake."""
    layer, _, key = name.partition(".")
    found: mx.Dtype | None = getattr(container[layer], "narrow", None) if key == "weight" else None
    return found
