"""Which tensors are FP8, where their scales are, and what part a scale covers.

Every published form is one rule: an E4M3 weight ``[…, O, I]`` is *multiplied* by
factors, each of which covers a block of rows and columns. The forms differ in the
block (128x128, a whole row, the whole tensor), in the scale's name and in whether
it is stored as a float or as an E8M0 exponent. Only the last two axes count, so
the rule is the same for 3-D combined and for stacked experts.

Names: ``weight_scale_inv`` is DeepSeek's and Qwen's, ``weight_scale`` that of
compressed-tensors and ModelOpt, ``.scale`` DeepSeek's newest.

Nothing is refused here: what does not fit is listed, and the planner says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from vllm_moe_compat.checkpoint.experts import STATIC_SCALES
from vllm_moe_compat.checkpoint.headers import TensorInfo

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
FLOATS = ("BF16", "F16", "F32")
E8M0 = ("F8_E8M0", "U8")
DEFAULT_BLOCK = (128, 128)
_NOT_WEIGHTS = ("_scale", "_scale_inv", "_scale_2", "_global_scale", ".scales", ".scale", "_scales")
_INVERSE = "_scale_inv"


def _scale_names(weight: str) -> Iterator[str]:
    """Yield what the scale of a weight may be called, the commonest first."""
    yield f"{weight}_scale_inv"
    yield f"{weight}_scale"
    if weight.endswith(".weight"):
        yield f"{weight.removesuffix('weight')}scale"
    else:
        yield f"{weight}_weight_scale"
        yield f"{weight}_weight_scale_inv"


Form: TypeAlias = tuple[str, tuple[int, ...], str, tuple[int, ...]]


@dataclass(slots=True)
class Fp8Tensors:
    """The FP8 tensors of a checkpoint, by how they can be read.

    Attributes:
        pairs: weight → its scale.
        bare: FP8 weights with no scale of any kind.
        orphans: scales whose weight is missing.
        plain: scale → its weight, where that is not FP8.
        static: scales of activations and of KV caches, which MLX has no use for.
        forms: dtype and shape of a weight and of its scale → the weights that are so.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)
    static: list[str] = field(default_factory=list)
    forms: dict[Form, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.pairs or self.bare or self.orphans or self.plain)


def find_fp8(tensors: Mapping[str, TensorInfo]) -> Fp8Tensors:
    """Pair every FP8 weight with its scale."""
    found = Fp8Tensors()
    static: list[str] = []
    for name, info in tensors.items():
        if info.dtype in FP8_DTYPES and not name.endswith(_NOT_WEIGHTS):
            scale = f"{name}_scale_inv"
            if scale not in tensors:
                scale = next((s for s in _scale_names(name) if s in tensors), "")
            if scale:
                found.pairs[name] = scale
                beside = tensors[scale]
                form = info.dtype, info.shape, beside.dtype, beside.shape
                found.forms.setdefault(form, []).append(name)
            else:
                found.bare.append(name)
        elif name.endswith((_INVERSE, "weight_scale")):
            # Nearly all scales have their weight beside them: that is seen at once.
            weight = tensors.get(name.removesuffix(_INVERSE).removesuffix("_scale"))
            if weight is None or weight.dtype not in FP8_DTYPES:
                _look_for_weight(name, tensors, found)
        elif name.endswith(STATIC_SCALES):
            static.append(name)
    if found.pairs:
        found.static = static
    return found


def _look_for_weight(scale: str, tensors: Mapping[str, TensorInfo], found: Fp8Tensors) -> None:
    """List a scale whose weight is missing or not FP8; 4-bit formats are not ours."""
    inverse = scale.endswith(_INVERSE)
    weight = scale.removesuffix(_INVERSE if inverse else "_scale")
    weight = weight if weight in tensors or inverse else weight.removesuffix("_weight")
    info = tensors.get(weight)
    if info is None:
        if inverse or f"{weight}_packed" not in tensors:
            found.orphans.append(scale)
    elif info.dtype in FLOATS or (inverse and info.dtype not in FP8_DTYPES):
        found.plain[scale] = weight


def block_of(
    weight: tuple[int, ...], scale: tuple[int, ...], blocks: tuple[tuple[int, int], ...]
) -> tuple[int, int] | None:
    """Return the rows and columns that one factor of a scale covers.

    Args:
        weight: shape ``[…, O, I]``.
        scale: shape of its scale: nothing, ``[O, 1]``, ``[O]``, a grid; per expert or not.
        blocks: what the config names; without any, the usual 128x128 is tried.

    Returns:
        None where the shapes do not fit each other.
    """
    if len(weight) < 2:
        return None
    *lead, rows, columns = weight
    for block in blocks or (DEFAULT_BLOCK,):
        if scale == (*lead, -(-rows // block[0]), -(-columns // block[1])):
            return block
    count = 1
    for size in scale:
        count *= size
    if count == 1 or (lead and scale[: len(lead)] == tuple(lead) and _ones(scale[len(lead) :])):
        return rows, columns
    if scale in ((*lead, rows, 1), (*lead, rows)):
        return 1, columns
    if scale == (*lead, 1, columns):
        return rows, 1
    return None


def _ones(shape: tuple[int, ...]) -> bool:
    return all(size == 1 for size in shape)


def infer_fp8(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Name as E4M3 what must be: MLX's loader calls FP8 bytes ``uint8`` (``U8``).

    A ``uint8`` weight is FP8 when its scale is ``_scale_inv`` or a float, and also
    when it has none of any kind: packed 4-bit formats always have one.
    """
    return {
        name: replace(info, dtype="F8_E4M3")
        if info.dtype == "U8" and _is_fp8_weight(name, tensors)
        else info
        for name, info in tensors.items()
    }


def _is_fp8_weight(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    if name.endswith(_NOT_WEIGHTS):
        return False
    for scale in _scale_names(name):
        if scale in tensors:
            return scale.endswith(_INVERSE) or tensors[scale].dtype in FLOATS
    if name.endswith(".weight"):
        return name.removesuffix("weight") + "scales" not in tensors
    if name.endswith((".gate_up_proj", ".down_proj", ".up_proj")):
        return name + "_scales" not in tensors
    return False
