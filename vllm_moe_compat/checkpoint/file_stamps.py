"""Size and time of a checkpoint's files, to notice that they changed since they were read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_moe_compat.checkpoint.headers import weight_files
from vllm_moe_compat.errors import CheckpointFileError


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Size in bytes, and modification time in nanoseconds, of the file behind all links."""

    size: int
    modified: int

    def __str__(self) -> str:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.modified / 1e9))
        return f"{self.size:,} bytes of {written}"


@dataclass(frozen=True, slots=True)
class FileStamps:
    """Stamps of the files that a load reads, by name in ``folder``."""

    folder: Path = Path()
    files: Mapping[str, FileStamp] = field(default_factory=dict)


def take(folder: Path) -> FileStamps:
    """Take the stamps of ``config.json`` and of the weights that mlx-lm loads."""
    found = {}
    for path in (folder / "config.json", *weight_files(folder)):
        try:
            status = path.stat()
        except OSError:
            continue  # The load itself reports it.
        found[path.name] = FileStamp(status.st_size, status.st_mtime_ns)
    return FileStamps(folder, found)


def check(stamps: FileStamps, remedy: str) -> None:
    """Check that the files are still those of ``stamps``.

    Raises:
        CheckpointFileError: a file was changed, added or removed; the message ends in ``remedy``.
    """
    now = take(stamps.folder).files
    for name in sorted(stamps.files.keys() | now.keys()):
        before, after = stamps.files.get(name), now.get(name)
        if before != after:
            raise CheckpointFileError(
                f"{stamps.folder / name}: when it was loaded there was {before or 'no such file'}, "
                f"and now there is {after or 'none'}; {remedy}."
            )
