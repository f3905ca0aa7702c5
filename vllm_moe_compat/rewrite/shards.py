"""Write safetensors shards: first every header, then each tensor at its slot.

All dtypes and shapes are given at the start. The headers are written and the disk space is
allocated at once, so that a full disk shows before the work begins. Tensors may then come in
any order, and none is kept in memory. Two reasons not to use a library: ``save_file`` takes
all tensors of a shard at once, and MLX has no name for E4M3.

A shard is finished when all its tensors are on the disk. Its checksums are then handed to the
caller, with which a later run can keep the shard and go on behind it.

Format: eight bytes of length (little-endian), a JSON header, the values. Source:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.index import INDEX
from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.errors import CheckpointFileError
from vllm_moe_compat.plan.estimate import nbytes

Checksums = Mapping[str, int]
"""Tensor → CRC-32 of its bytes."""

ALIGNMENT = 8
BYTES_AT_ONCE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor.

    Attributes:
        file: name of the shard.
        offset: first byte of the values in the shard.
        spec: dtype and shape.
    """

    file: str
    offset: int
    spec: Spec


def divide(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    """Group tensors, in order, into shards of at most ``limit`` bytes.

    A tensor above the limit gets a shard of its own.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, spec in specs.items():
        size = nbytes(spec)
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class DamagedShardError(CheckpointFileError):
    """A tensor was read back with other bytes than were written.

    Attributes:
        file: name of its shard.
    """

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(
            f"{path}: {name} was read back with other bytes than were written; check the disk, and "
            "try again."
        )
        self.file = path.name


def _nothing(*args: object) -> None:
    return None


class Shards:
    """The shards and the index of one checkpoint.

    Args:
        folder: an existing folder.
        specs: every tensor, in the order of the files.
        limit: bytes per shard.
        kind: ``format`` in the headers' metadata: ``mlx`` or ``pt``.
        finished: shard → checksums, of shards in the folder that an earlier run finished. A
            shard that is not as it should be is written anew.
        on_finished: called with a shard's name and checksums when it is on the disk.

    Attributes:
        total: bytes of all tensors.
        count: number of shards.
        written: names of the tensors that are in their slots.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, Spec],
        limit: int,
        kind: str,
        finished: Mapping[str, Checksums] | None = None,
        on_finished: Callable[[str, Checksums], None] = _nothing,
    ) -> None:
        self._folder = folder
        self._specs = dict(specs)
        self._slots: dict[str, Slot] = {}
        self._sums: dict[str, int] = {}
        self._missing: dict[str, int] = {}
        self._on_finished = on_finished
        self.total = sum(map(nbytes, specs.values()))
        groups = divide(specs, limit)
        self.count = len(groups)
        for number, names in enumerate(groups, start=1):
            file = "model.safetensors"
            if len(groups) > 1:
                file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._lay_out(file, names, kind, (finished or {}).get(file, {}))
        self._write_index()

    @property
    def written(self) -> frozenset[str]:
        """Names of the tensors that are in their slots."""
        return frozenset(self._sums)

    def _lay_out(self, file: str, names: Iterable[str], kind: str, sums: Checksums) -> None:
        header: dict[str, object] = {"__metadata__": {"format": kind}}
        ends: dict[str, tuple[int, int]] = {}
        end = 0
        # Wide dtypes first, so that every tensor starts at a multiple of its item size.
        for name in sorted(names, key=lambda n: -_width(self._specs[n])):
            begin, end = end, end + nbytes(self._specs[name])
            ends[name] = begin, end
        for name, offsets in ends.items():
            spec = self._specs[name]
            header[name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": list(offsets),
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        text = len(text).to_bytes(8, "little") + text
        for name, (begin, _) in ends.items():
            self._slots[name] = Slot(file, len(text) + begin, self._specs[name])
        path, size = self._folder / file, len(text) + end
        if sums.keys() == ends.keys() and _begins_with(path, text, size):
            self._sums |= sums
            return
        self._missing[file] = len(ends)
        path.unlink(missing_ok=True)
        with path.open("xb") as shard:
            shard.write(text)
            if hasattr(os, "posix_fallocate") and end:
                shard.flush()
                os.posix_fallocate(shard.fileno(), 0, size)
            else:
                shard.truncate(size)

    def write(self, name: str, array: mx.array) -> None:
        """Write one tensor; FP8 and E8M0 are ``uint8`` arrays.

        Raises:
            OSError: the disk is full or fails.
            RuntimeError: shape or size differ from the spec, which is a bug.
        """
        slot = self._slots[name]
        if tuple(array.shape) != slot.spec.shape or array.nbytes != nbytes(slot.spec):
            raise RuntimeError(f"{name} is {array.shape} {array.dtype}, not {slot.spec}")
        # Row-major; a view of another tensor may have other strides.
        flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
        data = memoryview(flat)  # type: ignore[arg-type]
        checksum = 0
        with (self._folder / slot.file).open("r+b") as shard:
            shard.seek(slot.offset)
            for start in range(0, len(data), BYTES_AT_ONCE):
                piece = data[start : start + BYTES_AT_ONCE]
                shard.write(piece)
                checksum = zlib.crc32(piece, checksum)
        self._missing[slot.file] -= name not in self._sums
        self._sums[name] = checksum
        if not self._missing[slot.file]:
            sync(self._folder / slot.file)
            names = (name for name, other in self._slots.items() if other.file == slot.file)
            self._on_finished(slot.file, {name: self._sums[name] for name in names})

    def finish(self) -> None:
        """Flush everything to the disk and check the headers by reading them back.

        Raises:
            CheckpointFileError: a header differs from the specs.
            RuntimeError: a tensor was never written, which is a bug.
        """
        if missing := self._specs.keys() - self._sums.keys():
            raise RuntimeError(f"{sorted(missing)[0]} was not written, nor {len(missing) - 1} more")
        for path in sorted(self._folder.iterdir()):
            sync(path)
        wanted = {
            name: TensorInfo(slot.spec.dtype, slot.spec.shape, slot.file)
            for name, slot in self._slots.items()
        }
        found = read_headers(self._folder)
        if found != wanted:
            name = next(n for n in {**wanted, **found} if wanted.get(n) != found.get(n))
            raise CheckpointFileError(
                f"{self._folder}: {name} was read back as {found.get(name)}, where "
                f"{wanted.get(name)} was written; check the disk, and try again."
            )

    def verify(self, done: Callable[[int], object] = _nothing) -> None:
        """Read every tensor back from the disk and compare its checksum with the written one.

        Args:
            done: called with 1 after each tensor.

        Raises:
            DamagedShardError: a checksum differs.
            OSError: a shard cannot be read.
        """
        by_file: dict[str, list[str]] = {}
        for name, slot in self._slots.items():
            by_file.setdefault(slot.file, []).append(name)
        for file, names in by_file.items():
            with (self._folder / file).open("rb") as shard:
                if hasattr(os, "posix_fadvise"):
                    # Drop the kernel's copy, which would hide what the disk has. It keeps pages
                    # that are not on the disk yet.
                    os.fsync(shard.fileno())
                    os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for name in names:
                    if _checksum(shard, self._slots[name]) != self._sums[name]:
                        raise DamagedShardError(self._folder / file, name)
                    done(1)

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": self.total},
            "weight_map": {name: self._slots[name].file for name in sorted(self._slots)},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _begins_with(path: Path, header: bytes, size: int) -> bool:
    """Whether the file is there, with this header and size."""
    try:
        with path.open("rb") as shard:
            return os.fstat(shard.fileno()).st_size == size and shard.read(len(header)) == header
    except FileNotFoundError:
        return False


def _checksum(shard: BinaryIO, slot: Slot) -> int:
    checksum, left = 0, nbytes(slot.spec)
    shard.seek(slot.offset)
    while left and (piece := shard.read(min(left, BYTES_AT_ONCE))):
        checksum = zlib.crc32(piece, checksum)
        left -= len(piece)
    return checksum if not left else -1


def _width(spec: Spec) -> int:
    return nbytes(Spec(spec.dtype, ()))
