"""Where each tensor of a safetensors file begins.

``headers`` reads names, shapes and dtypes by the safetensors library, which does not tell the
offsets. Whoever reads a part of a tensor from the file needs them. A header may be malicious, so
every range is checked: it lies in the file behind the header, and has exactly the bytes of its
dtype and shape.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.checkpoint.files import FileFault
from vllm_moe_compat.checkpoint.headers import MAX_AXES, MAX_HEADERS, TensorInfo
from vllm_moe_compat.dtypes import DTYPES, nbytes
from vllm_moe_compat.errors import CheckpointFileError

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Location:
    """A tensor of a file.

    Attributes:
        info: its dtype, shape and file.
        offset: its first byte, counted from the beginning of the file.
    """

    info: TensorInfo
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return nbytes(self.info.dtype, self.info.shape)


def locate(descriptor: int, file: str) -> dict[str, Location]:
    """Return every tensor of an open safetensors file.

    Args:
        descriptor: of the open file.
        file: its name, for messages.

    Raises:
        CheckpointFileError: the header is not readable, or contradicts itself or the file's size.
    """
    try:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADERS):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = os.pread(descriptor, length, 8)
        entries = json.loads(header)
        if len(header) != length or not isinstance(entries, dict):
            raise ValueError("no header")
        entries.pop(_METADATA, None)
        return {
            name: _location(name, entry, file, 8 + length, size) for name, entry in entries.items()
        }
    except (OSError, ValueError, RecursionError) as error:
        fault = FileFault("shard-unreadable", f"{file}: not a readable safetensors file ({error})")
        raise CheckpointFileError(str(fault)) from error


def _location(name: str, entry: Any, file: str, start: int, size: int) -> Location:
    """Return the tensor of one entry; ``start`` is the first byte after the header.

    Raises:
        ValueError: the entry is not valid, or its bytes are not those of its dtype and shape.
    """
    try:
        dtype, shape = entry["dtype"], entry["shape"]
        first, last = entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name} has no dtype, shape and data_offsets") from error
    numbers = [*shape, first, last] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name} has the shape {shape!r} at {first!r} to {last!r}")
    if dtype not in DTYPES or len(shape) > MAX_AXES:
        raise ValueError(f"{name} has the dtype {dtype!r} and {len(shape)} axes")
    wanted = nbytes(dtype, tuple(shape))
    if last - first != wanted or start + last > size:
        raise ValueError(
            f"{name} has bytes {first:,} to {last:,} of {size - start:,}, where the "
            f"{wanted:,} of {dtype} {shape} were expected"
        )
    return Location(TensorInfo(dtype, tuple(shape), file), start + first)
