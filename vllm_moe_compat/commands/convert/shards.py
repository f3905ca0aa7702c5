"""Safetensors shards that are laid out first and filled afterwards, tensor by tensor.

In goes what every tensor will be; the headers are written and the room is taken at
once, so a full disk shows before the work and not after it. Then each tensor goes to
its place, in any order, and nothing is held: a library's ``save`` wants the tensors of
a whole shard, and MLX's has no name for E4M3. The format is eight bytes of length, a
JSON header, and the values one after the other.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.index import INDEX
from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.errors import CheckpointFileError
from vllm_moe_compat.plan.estimate import nbytes

ALIGNMENT = 8
BYTES_AT_ONCE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: a shard, and the byte of it that the values begin at."""

    file: str
    offset: int
    spec: Spec


def divide(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    """Return the names in shards of at most ``limit`` bytes, in order.

    A tensor that is larger than that has a shard of its own.
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


class Shards:
    """The files of one checkpoint, from their headers to their index.

    Args:
        folder: where; exists.
        specs: every tensor that will be written, in the order of the files.
        limit: bytes of a shard.
        kind: what ``format`` says in the headers: ``mlx`` or ``pt``.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], limit: int, kind: str) -> None:
        self._folder = folder
        self._specs = dict(specs)
        self._places: dict[str, Place] = {}
        self._sums: dict[str, int] = {}
        self.total = sum(map(nbytes, specs.values()))
        groups = divide(specs, limit)
        self.count = len(groups)
        for number, names in enumerate(groups, start=1):
            file = "model.safetensors"
            if len(groups) > 1:
                file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._lay_out(file, names, kind)
        self._write_index()

    def _lay_out(self, file: str, names: Iterable[str], kind: str) -> None:
        header: dict[str, object] = {"__metadata__": {"format": kind}}
        ends: dict[str, tuple[int, int]] = {}
        end = 0
        # Wide numbers first, so that every tensor begins at a multiple of its width.
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
        for name, (begin, _) in ends.items():
            self._places[name] = Place(file, 8 + len(text) + begin, self._specs[name])
        with (self._folder / file).open("xb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            size = 8 + len(text) + end
            if hasattr(os, "posix_fallocate") and end:
                shard.flush()
                os.posix_fallocate(shard.fileno(), 0, size)
            else:
                shard.truncate(size)

    def write(self, name: str, array: mx.array) -> None:
        """Put one tensor to its place; FP8 and E8M0 come as ``uint8``.

        Raises:
            OSError: it could not be written.
            RuntimeError: it is not what was announced, which is a bug.
        """
        place = self._places[name]
        if tuple(array.shape) != place.spec.shape or array.nbytes != nbytes(place.spec):
            raise RuntimeError(f"{name} is {array.shape} {array.dtype}, not {place.spec}")
        # In the order of its axes; a view of another tensor may lie otherwise.
        flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
        data = memoryview(flat)  # type: ignore[arg-type]
        checksum = 0
        with (self._folder / place.file).open("r+b") as shard:
            shard.seek(place.offset)
            for start in range(0, len(data), BYTES_AT_ONCE):
                piece = data[start : start + BYTES_AT_ONCE]
                shard.write(piece)
                checksum = zlib.crc32(piece, checksum)
        self._sums[name] = checksum

    def finish(self) -> None:
        """See that all was written and is on the disk, headers read back.

        Raises:
            CheckpointFileError: what the headers say is not what was to be written.
            RuntimeError: a tensor was never written, which is a bug.
        """
        if missing := self._specs.keys() - self._sums.keys():
            raise RuntimeError(f"{sorted(missing)[0]} was not written, nor {len(missing) - 1} more")
        for path in sorted(self._folder.iterdir()):
            sync(path)
        wanted = {
            name: TensorInfo(place.spec.dtype, place.spec.shape, place.file)
            for name, place in self._places.items()
        }
        found = read_headers(self._folder)
        if found != wanted:
            name = next(n for n in {**wanted, **found} if wanted.get(n) != found.get(n))
            raise CheckpointFileError(
                f"{self._folder}: {name} was read back as {found.get(name)}, where "
                f"{wanted.get(name)} was written; see whether the disk is sound, and try again."
            )

    def verify(self) -> None:
        """Read every byte back and compare its sum with that of what was written.

        Raises:
            CheckpointFileError: a tensor has other bytes.
        """
        for name, place in self._places.items():
            checksum, left = 0, nbytes(place.spec)
            with (self._folder / place.file).open("rb") as shard:
                shard.seek(place.offset)
                while left and (piece := shard.read(min(left, BYTES_AT_ONCE))):
                    checksum = zlib.crc32(piece, checksum)
                    left -= len(piece)
            if checksum != self._sums[name]:
                raise CheckpointFileError(
                    f"{self._folder / place.file}: {name} was read back with other bytes than were "
                    "written; see whether the disk is sound, and try again."
                )

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": self.total},
            "weight_map": {name: self._places[name].file for name in sorted(self._places)},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """See that a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _width(spec: Spec) -> int:
    return nbytes(Spec(spec.dtype, ()))
