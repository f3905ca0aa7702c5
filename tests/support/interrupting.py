"""Conversions that are interrupted, and all that they leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_moe_compat.commands.convert.partial import Partial
from vllm_moe_compat.rewrite.shards import Checksums, Shards


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Raise KeyboardInterrupt before the tensor behind this number of shards is written."""
    shards = 0

    def finished(partial: Partial, file: str, checksums: Checksums) -> None:
        nonlocal shards
        real_finished(partial, file, checksums)
        shards += 1

    def write(self: Shards, name: str, array: object) -> None:
        if shards == after:
            raise KeyboardInterrupt
        real_write(self, name, array)  # type: ignore[arg-type]

    real_finished, real_write = Partial.finished, Shards.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partial, "finished", finished)
        patch.setattr(Shards, "write", write)
        yield
