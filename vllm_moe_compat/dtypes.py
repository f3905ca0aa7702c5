"""The table of tensor dtypes, by the names in safetensors headers.

MLX has no FP8 dtype: ``mx.load`` returns E4M3 and E8M0 as ``uint8``, so only a header tells
them from integers. Names and widths: ``Dtype`` in safetensors' ``tensor.rs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype.

    Attributes:
        bits: width of one value.
        mlx: name in ``mlx.core`` of the dtype that ``mx.load`` gives it; empty where it
            gives none.
    """

    bits: int
    mlx: str = ""


DTYPES = {
    "BOOL": Dtype(8, "bool_"),
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

HEADER_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Name in settings, options and config.json of a serving dtype → safetensors' name."""

FLOATS = tuple(HEADER_NAMES.values())
"""safetensors' names of the floats that weights are served in."""


def bits(name: str) -> int:
    """Return the bits of one value; an unknown dtype counts as bytes."""
    known = DTYPES.get(name)
    return 8 if known is None else known.bits


def is_float(name: str) -> bool:
    """Whether weights are served in this dtype."""
    return name in FLOATS


def mlx_dtype(name: str) -> mx.Dtype:
    """Return the MLX dtype by safetensors' name or by a key of ``HEADER_NAMES``.

    Raises:
        KeyError: MLX has no dtype for it.
    """
    import mlx.core as mx

    known = DTYPES[HEADER_NAMES.get(name, name)]
    if not known.mlx:
        raise KeyError(name)
    dtype: mx.Dtype = getattr(mx, known.mlx)
    return dtype


def header_name(dtype: mx.Dtype) -> str:
    """Return safetensors' name of an MLX dtype, or MLX's own where safetensors has none.

    The bytes of E4M3 and E8M0 give ``U8``.
    """
    return _header_names().get(dtype, str(dtype))


@cache
def _header_names() -> dict[mx.Dtype, str]:
    import mlx.core as mx

    names: dict[mx.Dtype, str] = {}
    for name, known in DTYPES.items():
        if known.mlx:
            names.setdefault(getattr(mx, known.mlx), name)
    return names
