"""Decide which modules are packed and in which format, and count the bytes it saves.

The decision is mlx-lm's own, as in ``mlx_lm.utils.quantize_model``: a module is quantised if
it has a packed form and rows of whole groups, and if the class's ``quant_predicate`` agrees.
A weight that the checkpoint stores in a format of MLX is held in it if its module has a packed
form at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import mlx.core as mx

from vllm_moe_compat.checkpoint.operations import MlxFormat
from vllm_moe_compat.plan.packing import Packing, Requantize


@dataclass(slots=True)
class QuantizationPolicy:
    """The format of every module that is packed, and the modules that are not.

    Attributes:
        formats: module path → its format.
        overrides: the entries of ``formats`` that differ from the format that the config has for
            the whole model.
        held: number of stored weights that MLX holds as they are.
        odd: modules left as floats because their rows are not whole groups.
        spared: modules left as floats because the checkpoint lists them.
    """

    formats: dict[str, Packing] = field(default_factory=dict)
    overrides: dict[str, Packing] = field(default_factory=dict)
    held: int = 0
    odd: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)


def decide(model: Any, setting: Requantize, is_spared: Callable[[str], bool]) -> QuantizationPolicy:
    """Decide for every module of the model.

    Args:
        model: the instance, its weights still unread.
        setting: the format of modules for which ``quant_predicate`` names none.
        is_spared: whether the checkpoint lists a module, given by its path, as not to be
            quantised.
    """
    policy = QuantizationPolicy()
    predicate = getattr(model, "quant_predicate", None)
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        shape = tuple(module.weight.shape)
        verdict = True if predicate is None else predicate(path, module)
        chosen = setting
        if isinstance(verdict, Mapping):
            chosen = Requantize(
                verdict.get("bits", setting.bits),
                verdict.get("group_size", setting.group),
                verdict.get("mode", "affine"),
            )
        if not verdict:
            continue
        if is_spared(path):
            policy.spared.append(path)
        elif not (setting.fits(shape) and chosen.fits(shape)):
            policy.odd.append(path)
        else:
            policy.formats[path] = chosen
            if chosen != setting:
                policy.overrides[path] = chosen
    return policy


def can_hold(module: Any, held: MlxFormat) -> bool:
    """Whether a module of the model takes its weight in a packed format."""
    if not hasattr(module, "to_quantized") or not held.fits(tuple(module.weight.shape)):
        return False
    return not held.global_scale or "global_scale" in signature(module.to_quantized).parameters


def held_formats(policy: QuantizationPolicy) -> tuple[str, ...]:
    """Return the formats in which stored weights are held, the commonest first."""
    held = Counter(str(f) for f in policy.formats.values() if isinstance(f, MlxFormat))
    return tuple(name for name, _ in held.most_common())


def bytes_by_format(weights: Mapping[str, mx.array], policy: QuantizationPolicy) -> dict[str, int]:
    """Return format or dtype → bytes in memory, the largest first."""
    count: Counter[str] = Counter()
    for name, array in weights.items():
        path = name.rpartition(".")[0]
        packing = policy.formats.get(path)
        kind = str(packing) if packing else str(array.dtype).rpartition(".")[2]
        count[kind] += array.nbytes
    return dict(count.most_common())


def bytes_saved(weights: Mapping[str, mx.array], policy: QuantizationPolicy) -> int:
    """Return the bytes of the quantised modules' float values, less those of their packed form."""
    saved = 0
    quantised = {p: f for p, f in policy.formats.items() if isinstance(f, Requantize)}
    for path, packing in quantised.items():
        parts = [weights.get(f"{path}.{kind}") for kind in ("weight", "scales", "biases")]
        if parts[0] is not None and parts[1] is not None:
            item = parts[1].dtype.size if packing.mode == "affine" else 2
            values = parts[0].size * 32 // packing.bits * item
            saved += values - sum(part.nbytes for part in parts if part is not None)
    return saved
