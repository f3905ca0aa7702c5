"""Operations that dequantise and quantise FP8.

Axes: ``O`` output rows, ``I`` input columns of a projection, ``o = ceil(O/b0)`` and
``i = ceil(I/b1)`` the grid of scales, for blocks of ``b0`` rows and ``b1`` columns.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.checkpoint.numbers.form import WrittenNumbers, WrittenWeights
from vllm_moe_compat.checkpoint.operations import Dequantize, Invertible, Operand, Spec
from vllm_moe_compat.errors import SettingError

SCALE = "scale"
"""The role of an FP8 weight's scale among its parts."""
_ROW, _TENSOR = (1, 0), (0, 0)


def scale_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales: ``[…, O, I]`` gives ``[…, o, i]``."""
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


@dataclass(frozen=True, slots=True)
class DequantizeFp8(Dequantize, Invertible):
    """E4M3 ``[…, O, I]`` times its scales, in the target dtype.

    Every scale covers ``block`` rows and columns, fewer at the lower and right edge:
    ``(128, 128)``, ``(1, I)`` for one per row, ``(O, I)`` for one per tensor. Scales have the
    shape ``[…, o, i]`` or another of the same size, or there is one for the whole tensor.
    The product is computed in float32 and rounded once.

    Attributes:
        block: rows and columns.
        e8m0: whether scales are exponent bytes ``b`` that stand for ``2 ** (b - 127)``.
    """

    block: tuple[int, int]
    e8m0: bool = False

    def result(self, given: Operand, target: str) -> Operand:
        """Drop the scales; keep the shape; the dtype becomes ``target``."""
        (weight,), (scale,) = given.weights, given.parts.get(SCALE, (Spec("", (0,)),))
        count, grid = math.prod(scale.shape), math.prod(scale_grid(weight.shape, self.block))
        if weight.dtype != "F8_E4M3" or count not in (1, grid):
            raise ValueError(f"{scale} does not scale {weight} in blocks of {self.block}")
        return Operand((Spec(target, weight.shape),))

    def inverse(self) -> QuantizeFp8:
        """Return the operation that quantises again, which rounds."""
        return QuantizeFp8(self.block, self.e8m0)

    @property
    def words(self) -> str:
        """``dequantise FP8 with scales per 128x128``."""
        scales = "E8M0 scales" if self.e8m0 else "scales"
        rows, columns = self.block
        if rows == 1 or columns == 1:
            return f"dequantise FP8 with {scales} per channel"
        if rows == columns and rows in (16, 32, 64, 128):
            return f"dequantise FP8 with {scales} per {rows}x{columns}"
        return f"dequantise FP8 with {scales} per block or tensor"

    def parts_follow(self, weight: Spec, parts: Mapping[str, Spec]) -> bool:
        """Whether the scales are a full grid with an entry for every block."""
        return SCALE in parts and parts[SCALE].shape == scale_grid(weight.shape, self.block)

    def transposed(self) -> DequantizeFp8:
        """Return the operation with rows and columns of its block exchanged."""
        return DequantizeFp8((self.block[1], self.block[0]), self.e8m0)

    @property
    def rows_per_part(self) -> int:
        """Rows of a block."""
        return self.block[0]

    @property
    def columns_per_part(self) -> int:
        """Columns of a block."""
        return self.block[1]


@dataclass(frozen=True, slots=True)
class QuantizeFp8(Invertible):
    """A float ``[…, O, I]`` becomes E4M3 and scales ``[…, o, i]``.

    A block's scale is its largest magnitude divided by 448, the largest E4M3 number: as
    float32, or rounded up to a power of two as an E8M0 byte. A block of zeros has the scale 1.
    """

    block: tuple[int, int]
    e8m0: bool = False

    def result(self, given: Operand, target: str) -> Operand:
        """Add scales; keep the shape; the dtype becomes E4M3."""
        (weight,) = given.weights
        kind = "F8_E8M0" if self.e8m0 else "F32"
        scales = Spec(kind, scale_grid(weight.shape, self.block))
        return Operand((Spec("F8_E4M3", weight.shape),), {SCALE: (scales,)})

    def inverse(self) -> DequantizeFp8:
        """Return the operation that multiplies by the scales."""
        return DequantizeFp8(self.block, self.e8m0)

    @property
    def words(self) -> str:
        """``quantise to FP8``."""
        return "quantise to FP8"


@dataclass(frozen=True, slots=True)
class WrittenFp8(WrittenNumbers):
    """FP8 with its settings.

    Attributes:
        block: rows and columns under one scale of the written matrix; 0 stands for the whole
            axis: ``(1, 0)`` is one scale per row, ``(0, 0)`` one per tensor.
        e8m0: whether scales are powers of two, stored as exponents.

    Raises:
        SettingError: a block size is negative.
    """

    block: tuple[int, int]
    e8m0: bool = False

    def __post_init__(self) -> None:
        if min(self.block) < 0:
            raise SettingError(f"block is {self.block}, where two whole numbers were expected.")

    def write(self, shape: tuple[int, ...], *weights: str) -> WrittenWeights:
        """Add a scale for every weight: ``_scale`` if per row, else ``_scale_inv``."""
        block = self.block[0] or shape[-2], self.block[1] or shape[-1]
        ending = "_scale" if self.block == _ROW else "_scale_inv"
        names = tuple(f"{weight}{ending}" for weight in weights)
        return WrittenWeights(((SCALE, names),), (DequantizeFp8(block, self.e8m0),))

    def quantization_config(self, kept: Collection[str]) -> dict[str, Any]:
        """Return the config of compressed-tensors (per row) or of DeepSeek and Qwen."""
        if self.block == _ROW:
            shared = {"num_bits": 8, "type": "float", "symmetric": True}
            group = {
                "targets": ["Linear"],
                "weights": shared | {"strategy": "channel", "dynamic": False},
                "input_activations": shared | {"strategy": "token", "dynamic": True},
            }
            return {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": sorted(kept),
            }
        described: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "modules_to_not_convert": sorted(kept),
        }
        if self.block != _TENSOR:
            described["weight_block_size"] = list(self.block)
        if self.e8m0:
            described["scale_fmt"] = "ue8m0"
        return described

    @property
    def words(self) -> str:
        """``FP8 128x128``, ``FP8 per row``."""
        known = {_ROW: "per row", _TENSOR: "per tensor"}
        return f"FP8 {known.get(self.block, 'x'.join(map(str, self.block)))}"
