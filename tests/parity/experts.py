"""The experts of a release, taken out of its tensors and put back in another layout."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from parity.reference import State

# [E, H, 2I] and [E, I, H] in the release; gpt-oss also alternates gate and up.
TRANSPOSED = ("gpt_oss", "llama4", "qwen3_vl_moe")
SAVED_TRANSPOSED = ("gpt_oss", "llama4")
INTERLEAVED = ("gpt_oss",)
COMBINED = ("qwen3_5_moe",)  # released so, saved per expert
W123 = {"w1": "gate", "w2": "down", "w3": "up"}
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}

_PER_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(w[123]|(?:gate|up|down)_proj)\.weight")
_COMBINED = re.compile(r"(.+\.experts)\.(gate_up_proj|up_proj|down_proj)(_bias)?")
_GRANITE = re.compile(r"(.+\.block_sparse_moe)\.(input|output)_linear\.weight")
_STEP = re.compile(r"(.+\.moe)\.(gate|up|down)_proj\.weight")


@dataclass
class Experts:
    """One layer's: ``[E, I, H]``, ``[E, I, H]`` and ``[E, H, I]``; biases ``[E, I]``."""

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    own: str = "combined"  # the release's layout


def take_experts(family: str, state: State) -> tuple[State, dict[str, Experts]]:
    """Split a release into everything else and, by path, the experts."""
    rest: State = {}
    experts: dict[str, Experts] = {}
    single: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for name, value in state.items():
        if match := _PER_EXPERT.fullmatch(name):
            part = W123.get(match[3]) or match[3].removesuffix("_proj")
            own = "w1/w2/w3" if match[3] in W123 else "per-expert"
            experts.setdefault(match[1], Experts(own=own))
            single.setdefault((match[1], part), {})[int(match[2])] = value
        elif match := _COMBINED.fullmatch(name):
            layer = experts.setdefault(match[1], Experts())
            _take_combined(layer, family, match[2], value, bool(match[3]))
        elif match := _GRANITE.fullmatch(name):
            layer = experts.setdefault(f"{match[1]}.experts", Experts(own="granite"))
            _take_combined(layer, family, f"{match[2]}_proj", value, False)
        elif match := _STEP.fullmatch(name):
            layer = experts.setdefault(f"{match[1]}.experts", Experts(own="step"))
            layer.parts[match[2]] = value
        else:
            rest[name] = value
    for (path, part), rows in single.items():
        experts[path].parts[part] = torch.stack([rows[e] for e in sorted(rows)])
    for layer in experts.values():  # transformers gives LongCat's zero experts weights too
        count = layer.parts["down"].shape[0]
        layer.parts = {part: value[:count] for part, value in layer.parts.items()}
    return rest, experts


def _take_combined(layer: Experts, family: str, kind: str, value: torch.Tensor, bias: bool) -> None:
    target = layer.biases if bias else layer.parts
    if family in SAVED_TRANSPOSED and not bias:
        value = value.mT
    axis = -1 if bias else -2
    if kind in ("down_proj", "output_proj"):
        target["down"] = value
    elif kind == "up_proj":
        target["up"] = value
    elif family in INTERLEAVED:
        index = torch.arange(0, value.shape[axis], 2)
        target["gate"] = value.index_select(axis, index)
        target["up"] = value.index_select(axis, index + 1)
    else:
        target["gate"], target["up"] = value.chunk(2, axis)


def per_expert(path: str, layer: Experts, names: dict[str, str] = NAMES) -> State:
    """One tensor per expert and projection."""
    state: State = {}
    for part, value in layer.parts.items():
        for e, matrix in enumerate(value):
            state[f"{path}.{e}.{names[part]}.weight"] = matrix
            if part in layer.biases:
                state[f"{path}.{e}.{names[part]}.bias"] = layer.biases[part][e]
    return state


def combined(family: str, path: str, layer: Experts, transposed: bool = False) -> State:
    """Gate and up in one tensor, gate first unless the family alternates them."""
    state: State = {}
    for suffix, axis, found in (("", -2, layer.parts), ("_bias", -1, layer.biases)):
        flip = transposed and not suffix
        if not found:
            continue
        if "gate" not in found:
            both = found["up"]
        elif family in INTERLEAVED:
            rows = found["gate"].ndim + axis
            both = torch.stack((found["gate"], found["up"]), rows + 1).flatten(rows, rows + 1)
        else:
            both = torch.cat((found["gate"], found["up"]), axis)
        kind = "gate_up_proj" if "gate" in found else "up_proj"
        state[f"{path}.{kind}{suffix}"] = both.mT if flip else both
        state[f"{path}.down_proj{suffix}"] = found["down"].mT if flip else found["down"]
    return state


def own_combined(family: str, path: str, layer: Experts) -> State:
    """Three-dimensional tensors, named as the family would."""
    base = path.removesuffix(".experts")
    parts = layer.parts
    if layer.own == "granite":
        return {
            f"{base}.input_linear.weight": torch.cat((parts["gate"], parts["up"]), -2),
            f"{base}.output_linear.weight": parts["down"],
        }
    if layer.own == "step":
        return {f"{base}.{NAMES[part]}.weight": value for part, value in parts.items()}
    return combined(family, path, layer, family in TRANSPOSED)


def own_single(family: str, path: str, layer: Experts) -> State:
    """One tensor per expert, named as the family would."""
    return per_expert(path, layer, SHORT if layer.own == "w1/w2/w3" else NAMES)


def released(family: str, path: str, layer: Experts) -> State:
    """The layout that the release itself has."""
    single = layer.own in ("per-expert", "w1/w2/w3") and family not in COMBINED
    return (own_single if single else own_combined)(family, path, layer)
