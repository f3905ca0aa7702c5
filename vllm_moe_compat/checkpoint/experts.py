"""Find the layout of the routed experts in one pass over the tensor names.

Four layouts are in use. *Per-expert*: one matrix ``….experts.{e}.{projection}.weight`` per
expert and projection. *Combined*: one tensor for gate and up of all experts of a layer, and one
for down. *Stacked*, the layout of MLX: ``….switch_mlp.{projection}.weight``, ``[E, O, I]``.
*Packed*: the 4-bit formats, which are left to mlx-lm. There is one ``ExpertBlock`` per MoE
layer.

Projections have many names. A *part* is the meaning of such a name: ``gate``, ``up``, ``down``
or ``gate_up``, with the suffix ``.bias`` for a bias. All expert indices are collected, so a gap
is found; counting up to the first missing index would hide it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from vllm_moe_compat.checkpoint.unused_scales import is_unused_scale

PROJECTIONS = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    **{"w1": "gate", "w3": "up", "w2": "down"},
    **{"fc1": "up", "fc2": "down"},
    **{"gate_up_proj": "gate_up", "input_linear": "gate_up", "output_linear": "down"},
}
"""Name of a projection → its part."""

SCALES = ("_scale_inv", "_scale")
"""Endings that turn a weight's name into the name of its scale."""
_PACKED = ("_packed", "_blocks", "_scales", ".scales", ".biases", ".qweight", ".qzeros", ".g_idx")
_PLACE = re.compile(
    r"\.(?:switch_mlp|moe\.mlp(?=\.\d)|block_sparse_moe(?=\.(?:in|out)put_linear\.)"
    r"|moe(?=\.(?:(?:gate|up|down)_proj\.|(?:gate_up|down)_proj$))"
    r"|\d+(?=\.(?:gate_up|down)_proj$))\."
)
"""Paths of experts that are not under ``.experts.``."""
_BESIDE = ("e_score_correction_bias", "post_expert_norm.weight")
"""Tensors beside the experts that all of them share."""
_INDEX = re.compile("0|[1-9][0-9]{0,8}")


@dataclass(slots=True)
class ExpertBlock:
    """The routed experts of one MoE layer.

    Attributes:
        path: prefix of the names: ``model.layers.0.mlp.experts``.
        per_expert: part → expert index → name.
        combined: part → name.
        stacked: part → name.
        packed: names in one of the 4-bit formats.
        unrecognized: names in none of these layouts.
        spelling: the projections' names in this checkpoint.
    """

    path: str
    per_expert: dict[str, dict[int, str]] = field(default_factory=dict)
    combined: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, str] = field(default_factory=dict)
    packed: list[str] = field(default_factory=list)
    unrecognized: list[str] = field(default_factory=list)
    spelling: set[str] = field(default_factory=set)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts found in the block; more than one is a contradiction."""
        if self.packed:
            return ("stacked",) if self.stacked else ("packed",)
        found = {
            "per-expert": self.per_expert,
            "combined": self.combined,
            "stacked": self.stacked,
        }
        return tuple(word for word, names in found.items() if names)

    def names(self) -> list[str]:
        """Return the names of all weights of the block."""
        return [
            *(name for experts in self.per_expert.values() for name in experts.values()),
            *self.combined.values(),
            *self.stacked.values(),
            *self.packed,
            *self.unrecognized,
        ]


def find_experts(names: Iterable[str]) -> list[ExpertBlock]:
    """Sort the names of routed experts into blocks, in the order of the names.

    Scales are skipped; ``checkpoint.numbers`` pairs them with their weights.
    """
    blocks: dict[str, ExpertBlock] = {}
    for name in names:
        if ".experts." in name:
            end = name.index(".experts.") + 8
        elif place := _PLACE.search(name):
            end = place.end() - 1
        else:
            continue
        path, rest = name[:end], name[end + 1 :]
        block = blocks.get(path)
        if block is None:
            block = blocks[path] = ExpertBlock(path)
        layout, part, index, spelling = _parse(rest)
        if layout == "per-expert":
            experts = block.per_expert.get(part)
            if experts is None:
                experts = block.per_expert[part] = {}
                block.spelling.add(spelling)
            experts[index] = name
        elif layout == "3-D":
            stacked = not spelling.endswith("_linear") and (
                path.endswith(".switch_mlp") or (part[:7] != "gate_up" and "." in rest)
            )
            (block.stacked if stacked else block.combined)[part] = name
            block.spelling.add(spelling)
        elif layout == "packed":
            block.packed.append(name)
        elif layout == "unrecognized":
            block.unrecognized.append(name)
    return [block for block in blocks.values() if block.layouts or block.unrecognized]


@lru_cache(maxsize=1 << 16)
def _parse(rest: str) -> tuple[str, str, int, str]:
    """Return layout, part, expert index and spelling for the rest of a name after its block's path.

    The layout is ``per-expert``, ``3-D`` (combined or stacked), ``packed``, ``scale`` or
    ``unrecognized``. The cache pays because every layer has the same few thousand endings.
    """
    nothing = ("unrecognized", "", -1, "")
    if is_unused_scale(rest):
        return "scale", "", -1, ""
    if rest.endswith(_PACKED) or rest.endswith(("_scale_2", "_global_scale", "weight_shape")):
        return "packed", "", -1, ""
    if rest.endswith(SCALES) or rest in _BESIDE:
        return "scale", "", -1, ""
    index, _, path = rest.partition(".")
    numbered = _INDEX.fullmatch(index) is not None
    if not numbered:
        path = rest.removeprefix("switch_glu.")
    bias = ""
    if path.endswith((".bias", "_bias")):
        path, bias = path[:-5], ".bias"
    else:
        path = path.removesuffix(".weight")
        if numbered and not rest.endswith(".weight"):
            return nothing
    if path not in PROJECTIONS:
        return ("per-expert", path, int(index), path) if numbered else nothing
    part = PROJECTIONS[path] + bias
    return ("per-expert", part, int(index), path) if numbered else ("3-D", part, -1, path)


def is_transposed(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """Whether combined experts are stored as ``[E, H, 2I]``, judged by their shapes.

    Args:
        gate_up: ``[E, 2I, H]``, or ``[E, H, 2I]`` if transposed.
        down: ``[E, H, I]``, or ``[E, I, H]`` if transposed.

    Returns:
        The two shapes together never fit both orientations, not even if ``H = 2I`` makes
        ``gate_up`` square. None if they fit neither.
    """
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0]:
        return None
    if gate_up[2] == down[1] and gate_up[1] == 2 * down[2]:
        return False
    if gate_up[1] == down[2] and gate_up[2] == 2 * down[1]:
        return True
    return None
