"""The table of tensor dtypes, by the names in safetensors headers.

MLX has no FP8 dtype: ``mx.load`` returns E4M3 and E8M0 as ``uint8``, so only a header tells
them from integers. Names and widths: ``Dtype`` in safetensors' ``tensor.rs``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype.

    Attributes:
        bits: width of one value.
        mlx: name of the MLX dtype that ``mx.load`` gives it; empty where it gives none.
    """

    bits: int
    mlx: str = ""


DTYPES = {
    "BOOL": Dtype(8, "bool"),
    "U8": Dtype(8, "uint8"),
    "I8": Dtype(8, "int8"),
    "U16": Dtype(16, "uint16"),
    "I16": Dtype(16, "int16"),
    "U32": Dtype(32, "uint32"),
    "I32": Dtype(32, "int32"),
    "U64": Dtype(64, "uint64"),
    "I64": Dtype(64, "int64"),
    "F16": Dtype(16, "float16"),
    "BF16": Dtype(16, "bfloat16"),
    "F32": Dtype(32, "float32"),
    "F64": Dtype(64),
    "C64": Dtype(64, "complex64"),
    "F8_E4M3": Dtype(8, "uint8"),
    "F8_E5M2": Dtype(8),
    "F8_E8M0": Dtype(8, "uint8"),
    "F6_E2M3": Dtype(6),
    "F6_E3M2": Dtype(6),
    "F4": Dtype(4),
}
"""safetensors' name → dtype."""

FLOATS = ("BF16", "F16", "F32")
"""safetensors' names of the floats that weights are served in."""

# Reversed, so that ``uint8`` is ``U8``: it holds the bytes of FP8 as well.
STORED_NAMES = {known.mlx: name for name, known in reversed(DTYPES.items()) if known.mlx}
"""Name in MLX, torch, settings and config.json → safetensors' name."""


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; an unknown dtype counts one byte per value."""
    known = DTYPES.get(dtype)
    return math.prod(shape) * (8 if known is None else known.bits) // 8


def stored_name(dtype: object) -> str:
    """Return safetensors' name of an MLX or torch dtype, or its own where there is none.

    The bytes of E4M3 and E8M0 give ``U8``.
    """
    return STORED_NAMES.get(str(dtype).rpartition(".")[2], str(dtype))


def mlx_dtype(name: str) -> mx.Dtype:
    """Return the MLX dtype by safetensors' name or by a key of ``STORED_NAMES``.

    Raises:
        KeyError: MLX loads no such dtype.
    """
    import mlx.core as mx

    known = DTYPES[STORED_NAMES.get(name, name)]
    if not known.mlx:
        raise KeyError(name)
    dtype: mx.Dtype = getattr(mx, "bool_" if known.mlx == "bool" else known.mlx)
    return dtype
