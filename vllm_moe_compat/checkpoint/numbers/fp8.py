"""FP8: E4M3 weights and the scales that multiply them.

All published variants follow one rule: an E4M3 weight ``[…, O, I]`` is *multiplied* by scales,
each of which covers a block of rows and columns. Variants differ in the block (128x128, a
whole row, the whole tensor), in the scale's name, and in the scale's dtype (float or E8M0
exponent). Only the last two axes count, so the rule is the same for combined and stacked
experts.

Names: ``weight_scale_inv`` in DeepSeek's and Qwen's releases, ``weight_scale`` in those of
compressed-tensors and ModelOpt, ``.scale`` in DeepSeek's newest.

A weight without its scale would load as small integers, a wrong grid as plausible nonsense. If
the config names no block, the block is 128x128, and a scale whose grid does not fit that is
refused: a grid does not determine its block (192 rows with 2 scales may be blocks of 96 or of
128).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from vllm_moe_compat.checkpoint.findings import CONVERT, Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers.form import (
    Details,
    FoundNumbers,
    NumberForm,
    StoredWeight,
)
from vllm_moe_compat.checkpoint.numbers.fp8_blocks import (
    DEFAULT_BLOCK,
    Block,
    Shape,
    block_of,
    block_sizes,
)
from vllm_moe_compat.checkpoint.numbers.fp8_ops import SCALE, DequantizeFp8, scale_grid
from vllm_moe_compat.dtypes import FLOATS
from vllm_moe_compat.errors import UnsupportedCheckpointError

Alike: TypeAlias = tuple[str, Shape, str, Shape, bool]
"""Dtype and shape of a weight and of its scale, and whether it is named ``…_scale_inv``."""

_E8M0 = ("F8_E8M0", "U8")
_DTYPES = ("F8_E4M3", "F8_E5M2")
_NOT_WEIGHTS = ("_scale", "_scale_inv", "_scale_2", "_global_scale", ".scales", ".scale", "_scales")
_INVERSE = "_scale_inv"


def _scale_names(weight: str) -> Iterator[str]:
    """Yield the names that a weight's scale may have, the commonest first."""
    yield f"{weight}_scale_inv"
    yield f"{weight}_scale"
    if weight.endswith(".weight"):
        yield f"{weight.removesuffix('weight')}scale"
    else:
        yield f"{weight}_weight_scale"
        yield f"{weight}_weight_scale_inv"


@dataclass(slots=True)
class Fp8Tensors(FoundNumbers):
    """The FP8 tensors of a checkpoint.

    Attributes:
        form: FP8.
        tensors: all tensors, for shapes and dtypes.
        blocks: rows and columns under one scale, by the config.
        weights: weight → its tensor and its scale.
        bare: FP8 weights without a scale.
        orphans: scales without a weight.
        plain: scale → its weight, if the weight is not FP8.
        unused: always empty.
        alike: dtypes, shapes and naming → the weights that share them.
    """

    form: NumberForm
    tensors: Mapping[str, TensorInfo]
    blocks: tuple[Block, ...] = ()
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    alike: dict[Alike, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.weights or self.bare or self.orphans or self.plain)

    def scale_of(self, weight: str) -> str:
        """Return the name of a weight's scale."""
        return self.weights[weight].parts[0][1]

    def logical(self, weight: str) -> TensorInfo:
        """Describe a weight, which has the shape of its tensor."""
        return self.tensors[weight]

    def stray(self) -> Collection[str]:
        """Return FP8 weights without a scale."""
        return self.bare

    def block_of(self, weight: Shape, scale: Shape) -> Block | None:
        """Return the rows and columns under one scale; None if the shapes do not fit."""
        return block_of(weight, scale, self.blocks)

    def dequantize(self, weight: str) -> DequantizeFp8:
        """Return the operation that multiplies a weight by its scale."""
        scale = self.tensors[self.scale_of(weight)]
        block = self.block_of(self.tensors[weight].shape, scale.shape)
        assert block is not None, "findings has refused it"
        return DequantizeFp8(block, scale.dtype in _E8M0)

    def findings(self) -> Iterator[Finding]:
        """Yield weights whose scale is missing or does not fit, and scales without a weight."""
        for name in self.bare:
            expected = f"{name.rpartition('.')[2]}_scale_inv"
            yield Finding(name, "is FP8 without a scale", expected, rank=1, topic="fp8")
        for name in self.orphans:
            found, expected = "scales a weight that is missing", "that weight beside it"
            yield Finding(name, found, expected, rank=1, topic="fp8")
        for name, weight in self.plain.items():
            found = f"scales a weight that is {self.tensors[weight].dtype}"
            yield Finding(name, found, "an FP8 weight beside it", rank=1, topic="fp8")
        for names in self.alike.values():
            finding = self._pair(names[0])
            if finding is not None:
                about_weight = finding.name == names[0]
                for name in names:
                    yield finding.of(name if about_weight else self.scale_of(name))

    def _pair(self, name: str) -> Finding | None:
        scale_name = self.scale_of(name)
        weight, scale = self.tensors[name], self.tensors[scale_name]
        if weight.dtype != "F8_E4M3":
            return _unsupported(name, f"is {weight.dtype}")
        if scale.dtype not in (*FLOATS, *_E8M0):
            return _unsupported(scale_name, f"holds {scale.dtype} scales")
        if len(weight.shape) < 2:
            return _unsupported(name, f"is FP8 of shape {list(weight.shape)}")
        if self.block_of(weight.shape, scale.shape) is not None:
            return None
        rows, columns = self.blocks[0] if self.blocks else DEFAULT_BLOCK
        source = "the config's" if self.blocks else "the usual"
        unnamed = "" if self.blocks else " and the config has no weight_block_size"
        return Finding(
            scale_name,
            f"has the shape {list(scale.shape)} for a weight of {list(weight.shape)}{unnamed}",
            f"{list(scale_grid(weight.shape, (rows, columns)))} for {source} blocks of "
            f"{rows}x{columns}",
            topic="fp8",
        )

    def kinds(self) -> list[frozenset[str]]:
        """Return the kinds of each group of similar weights.

        Every group is ``fp8``. ``fp8 block 128`` is a 2-D weight in blocks of 128x128, ``fp8
        tensor`` a weight with a single scale, both with a float ``…_scale_inv``. ``fp8 mx`` has
        one E8M0 exponent per 32 columns.
        """
        return list(map(self._kinds, self.alike))

    def _kinds(self, alike: Alike) -> frozenset[str]:
        _, weight, dtype, scale, inverse = alike
        found = {"fp8"}
        if inverse and dtype in FLOATS:
            if scale in ((), (*weight[:-2], 1, 1)):
                found.add("fp8 tensor")
            if len(weight) == len(scale) == 2 and self.block_of(weight, scale) == (128, 128):
                found.add("fp8 block 128")
        if dtype in _E8M0 and (*scale[:-1], *(32 * n for n in scale[-1:])) == weight:
            found.add("fp8 mx")
        return frozenset(found)

    @property
    def details(self) -> Details:
        """The variants and blocks that occur."""
        found: set[str] = set()
        blocks: set[Block] = set()
        for _, weight, _, scale, _ in self.alike:
            block = self.block_of(weight, scale)
            if block is None:
                continue
            blocks.add(block)
            if block == weight[-2:] and not self.blocks:
                found.add("per-tensor")
            else:
                found.add("per-channel" if 1 in block else "block")
        named = tuple(block for block in self.blocks if block in blocks)
        words = f"{' and '.join(sorted(found))} FP8".strip()
        return Details(
            words if self.weights or not self.bare else "FP8 without scales",
            len(self.weights) + len(self.bare),
            named or tuple(sorted(blocks)[:8]),
            tuple(sorted({dtype for _, _, dtype, _, _ in self.alike})),
            len(self.unused),
        )


class Fp8(NumberForm):
    """E4M3 with scales."""

    name = "fp8"
    title = "FP8"
    faults: Mapping[str, str] = MappingProxyType(
        {
            "scales": "an FP8 weight without a scale, or a scale that does not fit",
            "unsupported": "FP8 of a kind that MLX cannot decode",
        }
    )
    methods = frozenset({"fp8", "compressed-tensors", "modelopt", "fbgemm_fp8", "mxfp8", "quark"})
    dtypes = frozenset(_DTYPES)

    def find(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Fp8Tensors:
        """Pair every FP8 weight with its scale."""
        found = Fp8Tensors(self, tensors)
        weights, groups = found.weights, found.alike
        for name, info in tensors.items():
            if info.dtype in _DTYPES and not name.endswith(_NOT_WEIGHTS):
                scale = f"{name}_scale_inv"
                if scale not in tensors:
                    scale = next((s for s in _scale_names(name) if s in tensors), "")
                if not scale:
                    found.bare.append(name)
                    continue
                weights[name] = StoredWeight(name, ((SCALE, scale),))
                beside = tensors[scale]
                inverse = scale.endswith(_INVERSE)
                alike = info.dtype, info.shape, beside.dtype, beside.shape, inverse
                groups.setdefault(alike, []).append(name)
            elif name.endswith((_INVERSE, "weight_scale")):
                # Nearly all scales have their weight beside them: a fast path.
                weight = tensors.get(name.removesuffix(_INVERSE).removesuffix("_scale"))
                if weight is None or weight.dtype not in _DTYPES:
                    _look_for_weight(name, tensors, found)
        if found.weights:
            found.blocks = block_sizes(config)
        return found

    def infer(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Give FP8 weights that MLX's loader reports as ``uint8`` (``U8``) the dtype E4M3.

        A ``uint8`` weight is FP8 if its scale is named ``_scale_inv`` or has a float dtype, or
        if it has no scale: weights in packed 4-bit formats always have one.
        """
        return {
            name: replace(info, dtype="F8_E4M3")
            if info.dtype == "U8" and _is_weight(name, tensors)
            else info
            for name, info in tensors.items()
        }


FORM = Fp8()


def _unsupported(name: str, found: str) -> Finding:
    return Finding(
        name,
        found,
        "FP8 of the E4M3 kind with float or E8M0 scales",
        remedy=CONVERT,
        error=UnsupportedCheckpointError,
        rank=1,
        topic="fp8",
    )


def _look_for_weight(scale: str, tensors: Mapping[str, TensorInfo], found: Fp8Tensors) -> None:
    """Record a scale whose weight is missing or not FP8; skip scales of 4-bit formats."""
    inverse = scale.endswith(_INVERSE)
    weight = scale.removesuffix(_INVERSE if inverse else "_scale")
    weight = weight if weight in tensors or inverse else weight.removesuffix("_weight")
    info = tensors.get(weight)
    if info is None:
        if inverse or f"{weight}_packed" not in tensors:
            found.orphans.append(scale)
    elif info.dtype in FLOATS or (inverse and info.dtype not in _DTYPES):
        found.plain[scale] = weight


def _is_weight(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
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
