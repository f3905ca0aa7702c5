"""Arrays in a safetensors file, with the dtypes that a published header has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.execute.stored_tensors import StoredTensors

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def bits(array: mx.array) -> np.ndarray:
    """Return the values' bits, as unsigned integers of their size."""
    return np.array(mx.contiguous(array).view(_UNSIGNED[array.dtype.size]))


def write(
    folder: Path,
    arrays: Mapping[str, mx.array],
    tensors: Mapping[str, TensorInfo],
    file: str = "model.safetensors",
) -> None:
    """Write the arrays with the dtypes of ``tensors``."""
    header, data = {}, b""
    for name, array in arrays.items():
        octets = bits(array).tobytes()
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(octets)],
        }
        data += octets
    encoded = json.dumps(header).encode()
    (folder / file).write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def stored(
    folder: Path,
    arrays: Mapping[str, mx.array],
    tensors: Mapping[str, TensorInfo],
    gap: int = 0,
) -> StoredTensors:
    """Write the arrays and return them unread; by default, gaps are never read."""
    write(folder, arrays, tensors)
    return StoredTensors(folder, read_headers(folder), gap=gap)
