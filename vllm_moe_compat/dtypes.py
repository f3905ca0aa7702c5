"""Names, widths and kinds of dtypes: the one table.

A dtype's name here is the one that safetensors gives it (``BF16``, ``F8_E4M3``).
"""

from __future__ import annotations

import math

FLOATS = ("BF16", "F16", "F32")
"""Dtypes in which weights are stored as they are."""

STORED_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "complex64": "C64",
}
"""Name that MLX, torch and users write → safetensors' name. MLX has none for FP8."""
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; a dtype that is not in the table counts as bytes."""
    return math.prod(shape) * _BITS.get(dtype, 8) // 8


def stored_name(dtype: object) -> str:
    """Return safetensors' name of an MLX or torch dtype; its own name if it has none."""
    name = str(dtype).rpartition(".")[2]
    return STORED_NAMES.get(name, str(dtype))
