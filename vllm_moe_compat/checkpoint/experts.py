"""In which form the routed experts lie, found in one pass over the names.

Four forms are in use. *Per-expert*: ``….experts.{e}.{projection}.weight``, one
matrix each. *Combined*: all experts of a layer in one tensor for gate and up and
one for down. *Stacked*, MLX's own: ``….switch_mlp.{projection}.weight``,
``[E, O, I]``. *Packed*: any of the 4-bit formats, which are mlx-lm's business. A
model has one ``ExpertBlock`` per MoE layer.

Projections go by many names; a *part* is what they mean: ``gate``, ``up``,
``down`` or ``gate_up``, with ``.bias`` after it for a bias. Indices are collected
as they are, never counted up to the first gap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

PROJECTIONS = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    **{"w1": "gate", "w3": "up", "w2": "down"},
    **{"fc1": "up", "fc2": "down"},
    **{"gate_up_proj": "gate_up", "input_linear": "gate_up", "output_linear": "down"},
}
"""Name of a projection → its part."""

SCALES = ("_scale_inv", "_scale")
"""How the name of a weight's scale goes on after the weight's own."""
UNUSED_SCALES = ("activation_scale", "input_scale", "output_scale", "k_scale", "v_scale")
"""How names of scales of activations and of KV caches end."""
_PACKED = ("_packed", "_blocks", "_scales", ".scales", ".biases", ".qweight", ".qzeros", ".g_idx")
_PLACE = re.compile(
    r"\.(?:switch_mlp|moe\.mlp(?=\.\d)|block_sparse_moe(?=\.(?:in|out)put_linear\.)"
    r"|moe(?=\.(?:(?:gate|up|down)_proj\.|(?:gate_up|down)_proj$))"
    r"|\d+(?=\.(?:gate_up|down)_proj$))\."
)
"""Where experts are that are not under ``.experts.``."""
_BESIDE = ("e_score_correction_bias", "post_expert_norm.weight")
"""What lies among the experts and is one for all of them."""
_INDEX = re.compile("0|[1-9][0-9]{0,8}")


@dataclass(slots=True)
class ExpertBlock:
    """The routed experts of one MoE layer.

    Attributes:
        path: where they are: ``model.layers.0.mlp.experts``.
        per_expert: part → expert index → name.
        combined: part → name.
        stacked: part → name, in MLX form.
        packed: names in one of the 4-bit formats.
        other: names that are in none of the forms.
        spelling: the projections' names as they were found.
    """

    path: str
    per_expert: dict[str, dict[int, str]] = field(default_factory=dict)
    combined: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, str] = field(default_factory=dict)
    packed: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    spelling: set[str] = field(default_factory=set)

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms found here, in words; more than one is a contradiction."""
        if self.packed:
            return ("MLX form",) if self.stacked else ("packed",)
        found = {
            "per-expert": self.per_expert,
            "combined": self.combined,
            "MLX form": self.stacked,
        }
        return tuple(word for word, names in found.items() if names)

    def names(self) -> list[str]:
        """Return the weights of the block, in whichever form."""
        return [
            *(name for experts in self.per_expert.values() for name in experts.values()),
            *self.combined.values(),
            *self.stacked.values(),
            *self.packed,
            *self.other,
        ]


def find_experts(names: Iterable[str]) -> list[ExpertBlock]:
    """Sort the names of routed experts into blocks, in the order of the names.

    Scales belong to their weights and are left to ``quantization``.
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
        form, part, index, spelling = _parse(rest)
        if form == "per-expert":
            experts = block.per_expert.get(part)
            if experts is None:
                experts = block.per_expert[part] = {}
                block.spelling.add(spelling)
            experts[index] = name
        elif form == "3-D":
            stacked = not spelling.endswith("_linear") and (
                path.endswith(".switch_mlp") or (part[:7] != "gate_up" and "." in rest)
            )
            (block.stacked if stacked else block.combined)[part] = name
            block.spelling.add(spelling)
        elif form == "packed":
            block.packed.append(name)
        elif form == "other":
            block.other.append(name)
    return [block for block in blocks.values() if block.forms or block.other]


@lru_cache(maxsize=1 << 16)
def _parse(rest: str) -> tuple[str, str, int, str]:
    """Return form, part, expert index and spelling of what follows a block's path.

    Forms are ``per-expert``, ``3-D``, ``packed``, ``scale`` and ``other``. The same
    few thousand endings recur in every layer, hence the cache.
    """
    nothing = ("other", "", -1, "")
    if rest.endswith(_PACKED) or rest.endswith(("_scale_2", "_global_scale", "weight_shape")):
        return "packed", "", -1, ""
    if rest.endswith((*SCALES, *UNUSED_SCALES)) or rest in _BESIDE:
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
    """Tell ``[E, H, 2I]`` beside ``[E, I, H]`` from ``[E, 2I, H]`` beside ``[E, H, I]``.

    The two shapes together never allow both readings, not even where ``H = 2I``
    makes the first of them square. None where they allow neither.
    """
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0]:
        return None
    if gate_up[2] == down[1] and gate_up[1] == 2 * down[2]:
        return False
    if gate_up[1] == down[2] and gate_up[2] == 2 * down[1]:
        return True
    return None
