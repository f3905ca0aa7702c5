"""Compare the stored bytes of two tensors without loading them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from vllm_moe_compat.checkpoint.files import AGAIN, UnreadableError, opened
from vllm_moe_compat.checkpoint.headers import MAX_HEADERS, TensorInfo
from vllm_moe_compat.errors import CheckpointFileError

_CHUNK = 4 * 2**20


def same_bytes(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    one: str,
    other: str,
    *,
    most: int | None = None,
) -> bool:
    """Whether two tensors have the same dtype, shape and bytes.

    At most 8 MiB are held, and reading ends at the first difference.

    Args:
        folder: the checkpoint's folder.
        tensors: its tensors, by their headers.
        one: name of a tensor.
        other: name of another.
        most: number of bytes that are compared, from the beginning; None for all.

    Raises:
        CheckpointFileError: a file cannot be read, or has changed since its header was read.
    """
    a, b = tensors[one], tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    try:
        first, at, size = _open(folder / a.file, one)
        try:
            second, there, length = _open(folder / b.file, other)
            try:
                if size != length:
                    return False
                size = size if most is None else min(size, most)
                for start in range(0, size, _CHUNK):
                    count = min(_CHUNK, size - start)
                    if os.pread(first, count, at + start) != os.pread(second, count, there + start):
                        return False
                return True
            finally:
                os.close(second)
        finally:
            os.close(first)
    except (OSError, ValueError, KeyError, TypeError, UnreadableError) as error:
        raise CheckpointFileError(
            f"{a.file}: {one} could not be compared with {other} in {b.file} ({error}); {AGAIN}."
        ) from error


def _open(path: Path, name: str) -> tuple[int, int, int]:
    """Return a descriptor of a safetensors file, and the range of a tensor in it."""
    descriptor = opened(path)
    try:
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if length > MAX_HEADERS:
            raise ValueError(f"its header claims {length:,} bytes")
        begin, end = json.loads(os.pread(descriptor, length, 8))[name]["data_offsets"]
        return descriptor, 8 + length + int(begin), int(end) - int(begin)
    except BaseException:
        os.close(descriptor)
        raise
