"""Read name, shape and dtype of every tensor from the safetensors headers.

The files are those that mlx-lm loads (``model*.safetensors``). The reader is that of the
safetensors library, which validates them: a truncated or corrupt shard is refused by name
before a tensor is read. MLX's reader would not do, since it reports E4M3, E8M0 and plain
bytes all as ``uint8``.

Three checks are added, since a header may be malicious: only regular files are opened, the
size of all headers together is limited, and a name that occurs twice in a header, which
safetensors reads as one, is refused.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_compat.checkpoint.files import (
    AGAIN,
    FileFault,
    Report,
    UnreadableError,
    opened,
    parse_json,
    refuse,
)
from vllm_moe_compat.checkpoint.names import fold

MAX_HEADERS = 128 * 2**20
"""Limit for all headers together, in bytes; those of 61,000 tensors have 10 million.
safetensors itself allows 100 million per file."""
MAX_TENSORS = 500_000
"""Limit for the tensors of a checkpoint; 384 packed experts in 60 layers are 280,000."""
MAX_AXES = 16
"""Limit for the axes of a tensor; real weights have at most five."""
_ENTRY = b'"data_offsets"'


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it.

    Attributes:
        dtype: safetensors' name: ``F8_E4M3``, ``BF16``, ``U8``, …
        shape: stored shape.
        file: file name of the shard; empty for a tensor without a file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str = ""


def weight_files(model_dir: Path) -> list[Path]:
    """Return the files that mlx-lm loads, by the pattern that mlx-lm uses."""
    return sorted(Path(name) for name in glob.glob(str(model_dir / "model*.safetensors")))


def metadata_of(path: Path) -> dict[str, str]:
    """Return the ``__metadata__`` of a safetensors file; empty if the file is not readable."""
    from safetensors import SafetensorError, safe_open

    try:
        os.close(opened(path))
        with safe_open(path, framework="numpy") as shard:
            return dict(shard.metadata() or {})
    except (UnreadableError, SafetensorError, OSError, ValueError):
        return {}  # ``scan_headers`` reports it.


def read_headers(model_dir: Path) -> dict[str, TensorInfo]:
    """Read the headers of all shards; without a shard the result is empty.

    Raises:
        CheckpointFileError: a shard cannot be read, or a tensor is in two shards.
    """
    return scan_headers(weight_files(model_dir), refuse)


def scan_headers(files: Sequence[Path], report: Report) -> dict[str, TensorInfo]:
    """Read the headers of these files; continue after a fault if ``report`` returns."""
    tensors: dict[str, TensorInfo] = {}
    room = MAX_HEADERS
    for path in files:
        try:
            descriptor = opened(path)
        except UnreadableError as error:
            report(_unreadable(path.name, error))
            continue
        try:
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            size = os.fstat(descriptor).st_size
            # safetensors reports a length beyond the end of the file.
            room -= min(length, size)
            if room < 0:
                report(_too_large(path.name, f"{MAX_HEADERS:,} bytes"))
                return tensors
            if not _scan(path, descriptor, length, tensors, report):
                return tensors
        except OSError as error:
            report(_unreadable(path.name, error))
        finally:
            os.close(descriptor)
    return tensors


def _scan(
    path: Path, descriptor: int, length: int, tensors: dict[str, TensorInfo], report: Report
) -> bool:
    """Read one header into ``tensors``, without replacing entries.

    Returns:
        Whether the limit on tensors allows another header.
    """
    from safetensors import SafetensorError, safe_open

    file, before, again = path.name, len(tensors), 0
    twins: dict[str, list[str]] = {}
    try:
        with safe_open(path, framework="numpy") as shard:
            # Names in the file's order, which is also their order in messages.
            names = shard.offset_keys()
            if before + len(names) > MAX_TENSORS:
                report(_too_large(file, f"{MAX_TENSORS:,} tensors"))
                return False
            for name in names:
                view = shard.get_slice(name)
                info = TensorInfo(view.get_dtype(), tuple(view.get_shape()), file)
                if len(info.shape) > MAX_AXES:
                    raise ValueError(f"{fold([name])} has {len(info.shape):,} axes")
                if (twin := tensors.setdefault(name, info)) is not info:
                    twins.setdefault(twin.file, []).append(name)
                    again += 1
    except (SafetensorError, OSError, ValueError) as error:
        report(_unreadable(file, error))
        return True
    for twin_file, names in twins.items():
        report(
            FileFault(
                "tensor-duplicate",
                f"{file}: {fold(names)} is in {twin_file} too, where one shard was expected "
                "to hold it",
                "remove the file that is not part of the checkpoint",
            )
        )
    # Counting is fast and parsing takes a second, so parse only if the count differs.
    header = os.pread(descriptor, length, 8)
    if header.count(_ENTRY) != len(tensors) - before + again:
        _, twice = parse_json(header.decode("utf-8"))
        if twice := [name for name in twice if name in tensors]:
            found = f"its header has {fold(twice)} twice, where each tensor was expected once"
            report(FileFault("tensor-duplicate", f"{file}: {found}"))
    return True


def _too_large(file: str, limit: str) -> FileFault:
    return FileFault(
        "headers-too-large",
        f"{file}: with it the headers have more than {limit}, which no real checkpoint has",
        "get the checkpoint from a source you trust",
    )


def _unreadable(file: str, error: Exception) -> FileFault:
    return FileFault(
        "shard-unreadable",
        f"{file}: not a readable safetensors file ({error})",
        f"the download may be incomplete, so {AGAIN}",
    )
