"""Which modules are packed, and how; and what that saves.

The decision is mlx-lm's own, as in ``mlx_lm.utils.quantize_model``: modules that have a
packed form and whole groups, as the class's ``quant_predicate`` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from vllm_moe_compat.plan.packing import Requantize


@dataclass(slots=True)
class Choices:
    """Which modules are packed, and how.

    Attributes:
        formats: module path → its format.
        overrides: those whose format is not the setting's own.
        odd: modules that stay as they are because a row is no whole number of groups.
        spared: modules that stay as they are because the checkpoint lists them.
    """

    formats: dict[str, Requantize] = field(default_factory=dict)
    overrides: dict[str, Requantize] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)


def choose(model: Any, setting: Requantize, listed: Callable[[str], bool]) -> Choices:
    """Decide for every module of the model.

    Args:
        model: the instance, its weights still unread.
        setting: the format wanted.
        listed: whether the checkpoint asks for a module, by its path, to be spared.
    """
    choices = Choices()
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
        if listed(path):
            choices.spared.append(path)
        elif not (setting.fits(shape) and chosen.fits(shape)):
            choices.odd.append(path)
        else:
            choices.formats[path] = chosen
            if chosen != setting:
                choices.overrides[path] = chosen
    return choices


def held(weights: Mapping[str, mx.array], choices: Choices) -> dict[str, int]:
    """Return the bytes held in each format, the largest share first."""
    count: Counter[str] = Counter()
    for name, array in weights.items():
        path = name.rpartition(".")[0]
        packing = choices.formats.get(path)
        form = str(packing) if packing else str(array.dtype).rpartition(".")[2]
        count[form] += array.nbytes
    return dict(count.most_common())


def saved(weights: Mapping[str, mx.array], choices: Choices) -> int:
    """Return how many bytes fewer the packed modules take than their values would."""
    bytes_saved = 0
    for path, packing in choices.formats.items():
        parts = [weights.get(f"{path}.{kind}") for kind in ("weight", "scales", "biases")]
        if parts[0] is not None and parts[1] is not None:
            item = parts[1].dtype.size if packing.mode == "affine" else 2
            values = parts[0].size * 32 // packing.bits * item
            bytes_saved += values - sum(part.nbytes for part in parts if part is not None)
    return bytes_saved
