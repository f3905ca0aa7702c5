"""Tensors that lie in safetensors files, of which only the needed parts are read.

``mx.load`` reads whole tensors. One expert of a combined tensor, or the share of one rank, is a
part: a range along each axis. A ``StoredTensor`` is such a part that has not been read yet.
Slicing it reads nothing; ``read`` reads exactly its bytes, by ``pread`` into the memory of the
result. Files are never mapped, so a file that shrinks gives an error and not a dead process.

A range of columns is many short runs of bytes. Runs that lie closer together than ``GAP`` are read
in one call with what lies between them, since a call costs more than those bytes do. All bytes
that are read are counted.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, Union

import mlx.core as mx
import numpy as np

from vllm_moe_compat.checkpoint.file_stamps import FileStamp, FileStamps
from vllm_moe_compat.checkpoint.files import UnreadableError, opened
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.offsets import Location, locate
from vllm_moe_compat.dtypes import DTYPES, mlx_dtype, nbytes
from vllm_moe_compat.errors import CheckpointFileError
from vllm_moe_compat.plan.tensor_names import TensorNames

GAP = 4096
"""Bytes between two runs that are read rather than skipped: those of a page, which the system
reads as a whole."""
_AT_ONCE = 2**20
"""Limit for what one call reads of runs with gaps, in bytes."""
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
Source: TypeAlias = Union[mx.array, "StoredTensor"]
"""A source of a build: an array, or what has to be read first."""


class StoredFile:
    """One open file of a checkpoint, which stays open as long as this object lives.

    Attributes:
        path: of the file.
        counter: counts bytes that are read.
        stamp: size and time of the file when it was opened.
    """

    def __init__(self, path: Path, counter: Counter, stamp: FileStamp | None = None) -> None:
        """Open the file.

        Args:
            path: of the file.
            counter: counts bytes that are read.
            stamp: what the file was when its header was read, if that is known.

        Raises:
            CheckpointFileError: it cannot be opened, or is no longer that file.
        """
        # The working folder may change before the file is looked at again.
        self.path, self.counter = path.absolute(), counter
        try:
            self._descriptor = opened(path)
        except UnreadableError as error:
            raise CheckpointFileError(
                f"{path.name}: not readable ({error}), where a file of the checkpoint was "
                "expected; check the folder, and download the file again if it is gone."
            ) from error
        status = os.fstat(self._descriptor)
        self._inode = (status.st_dev, status.st_ino)
        self.stamp = FileStamp(status.st_size, status.st_mtime_ns)
        if stamp is not None and stamp != self.stamp:
            self.stamp = stamp
            raise self._change(status)

    # ``os.close`` is bound here, since modules may be gone when the interpreter ends.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if (descriptor := self.__dict__.pop("_descriptor", None)) is not None:
            close(descriptor)

    def changed(self) -> CheckpointFileError | None:
        """Return an error if the file was written to, replaced or removed since it was opened.

        Its open handle would still read a file that was replaced. But what the folder holds now
        is another checkpoint, and whoever replaced it expects that one.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return self._change(None)
        same = (status.st_dev, status.st_ino) == self._inode
        if same and FileStamp(status.st_size, status.st_mtime_ns) == self.stamp:
            return None
        return self._change(status)

    def _change(self, status: os.stat_result | None) -> CheckpointFileError:
        found = "none"
        if status is not None:
            found = f"{FileStamp(status.st_size, status.st_mtime_ns)}"
            if (status.st_dev, status.st_ino) != self._inode:
                found += " in another file"
        return CheckpointFileError(
            f"{self.path.name}: when it was loaded there was {self.stamp}, and now there is "
            f"{found}; put the file back as it was, or load the checkpoint again."
        )

    def locations(self) -> dict[str, Location]:
        """Return its tensors.

        Raises:
            CheckpointFileError: the header is not readable.
        """
        return locate(self._descriptor, self.path.name)

    def read(self, offset: int, into: Bytes, tensor: str) -> None:
        """Fill ``into``, one contiguous buffer, with the bytes from ``offset`` on.

        Raises:
            CheckpointFileError: the file ends before, or cannot be read.
        """
        buffer, read = into.data, 0
        while read < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[read:]], offset + read)
            except OSError as error:
                raise self._failure(tensor, f"not readable ({error})") from error
            if not count:
                size = os.fstat(self._descriptor).st_size
                raise self._failure(
                    tensor,
                    f"it ends after {size:,} bytes, where {offset + len(buffer):,} were expected",
                )
            read += count
        self.counter.add(read)

    def _failure(self, tensor: str, found: str) -> CheckpointFileError:
        return CheckpointFileError(
            f"{self.path.name}: {tensor} could not be read, since {found}; check that the file is "
            "complete and no other program writes to it, and load the checkpoint again."
        )


class Counter:
    """A count that several threads add to."""

    def __init__(self) -> None:
        """Begin at 0."""
        self._lock, self.value = threading.Lock(), 0

    def add(self, number: int) -> None:
        """Add ``number``."""
        with self._lock:
            self.value += number


class StoredTensor:
    """A part of a tensor in a file: a range along each axis.

    It answers to ``shape``, ``ndim``, ``size``, ``dtype``, ``nbytes``, slices with ``start:stop``
    and ``reshape`` as an ``mx.array`` does.
    """

    __slots__ = ("_gap", "_offset", "_spans", "_whole", "file", "kind", "name")

    def __init__(
        self,
        file: StoredFile,
        name: str,
        location: Location,
        gap: int = GAP,
    ) -> None:
        """Describe a whole tensor; nothing is read.

        Args:
            file: the open file.
            name: name of the tensor, for messages.
            location: where the tensor lies.
            gap: bytes between two runs that are read rather than skipped.
        """
        self.file, self.name, self.kind = file, name, location.info.dtype
        self._offset, self._gap = location.offset, gap
        self._whole = location.info.shape
        self._spans = tuple((0, size) for size in self._whole)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of this part."""
        return tuple(stop - start for start, stop in self._spans)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self._spans)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of this part."""
        return nbytes(self.kind, self.shape)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that ``mx.load`` gives it.

        Raises:
            CheckpointFileError: MLX has none.
        """
        try:
            return mlx_dtype(self.kind)
        except KeyError:
            raise CheckpointFileError(
                f"{self.file.path.name}: {self.name} is {self.kind}, which MLX does not read, "
                "where numbers that it reads were expected; convert the tensor."
            ) from None

    def __getitem__(self, key: Any) -> StoredTensor:
        """Return a part of this part; ``key`` has slices with step 1, and may have an ellipsis.

        Raises:
            IndexError: the key is not of that kind.
        """
        keys = list(key) if isinstance(key, tuple) else [key]
        if (at := next((n for n, k in enumerate(keys) if k is Ellipsis), None)) is not None:
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        keys += [slice(None)] * (self.ndim - len(keys))
        if len(keys) > self.ndim or not all(
            isinstance(k, slice) and k.step in (None, 1) for k in keys
        ):
            raise IndexError(f"{key!r} does not slice the {self.ndim} axes of {self.name}")
        spans = []
        for (start, stop), one in zip(self._spans, keys, strict=True):
            first, last, _ = one.indices(stop - start)
            spans.append((start + first, start + max(first, last)))
        return self._with(tuple(spans), self._whole)

    def reshape(self, *shape: int) -> Source:
        """Return the tensor in another shape; a part that has gaps is read."""
        wanted = list(shape)
        if -1 in wanted:
            known = math.prod(n for n in wanted if n != -1)
            wanted[wanted.index(-1)] = self.size // known if known else 0
        if tuple(wanted) == self.shape:
            return self
        if self.shape != self._whole:
            return self.read().reshape(*shape)
        if math.prod(wanted) != self.size:
            raise ValueError(f"{self.name} {self.shape} cannot become {shape}")
        return self._with(tuple((0, n) for n in wanted), tuple(wanted))

    def with_merged_ends(self) -> StoredTensor:
        """Return the tensor with its last two axes as one; reads nothing.

        Raises:
            ValueError: a part of the last axis was cut off.
        """
        *lead, (start, stop), last = self._spans
        *whole, _, width = self._whole
        if last != (0, width):
            raise ValueError(f"{self.name} is cut in its last axis")
        merged = (*whole, self._whole[-2] * width)
        return self._with((*lead, (start * width, stop * width)), merged)

    def _with(self, spans: tuple[tuple[int, int], ...], whole: tuple[int, ...]) -> StoredTensor:
        part = object.__new__(StoredTensor)
        part.file, part.name, part.kind = self.file, self.name, self.kind
        part._offset, part._gap, part._spans, part._whole = self._offset, self._gap, spans, whole
        return part

    def read(self) -> mx.array:
        """Return the values, evaluated.

        Raises:
            CheckpointFileError: the file does not have the bytes, or MLX not the dtype.
        """
        dtype = self.dtype
        if mx.default_device().type == mx.DeviceType.cpu:
            array = mx.zeros(self.shape, dtype=dtype)
            self.read_into(bytes_of(array))
            return array
        # Another device may have memory of its own.
        buffer = np.empty(self.nbytes, np.uint8)
        self.read_into(buffer)
        return mx.array(buffer).view(dtype).reshape(self.shape)

    def read_into(self, target: Bytes) -> None:
        """Read the bytes into a contiguous, writable buffer ``uint8 [nbytes]``.

        Raises:
            CheckpointFileError: the file does not have the bytes.
        """
        if target.shape != (self.nbytes,):
            raise ValueError(f"{self.name} has {self.nbytes:,} bytes, not {target.shape}")
        at = 0
        for offset, rows, stride, length in self._runs():
            here = target[at : at + rows * length]
            at += rows * length
            if rows == 1 or stride - length > self._gap:
                for row in range(rows):
                    piece = here[row * length : (row + 1) * length]
                    self.file.read(offset + row * stride, piece, self.name)
                continue
            fitting = max(1, _AT_ONCE // stride)
            for top in range(0, rows, fitting):
                count = min(fitting, rows - top)
                scratch = np.empty((count - 1) * stride + length, np.uint8)
                self.file.read(offset + top * stride, scratch, self.name)
                found = np.lib.stride_tricks.as_strided(scratch, (count, length), (stride, 1))
                here[top * length : (top + count) * length].reshape(count, length)[:] = found

    def _runs(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield offset in the file, number, stride and length of equal runs, in bytes."""
        if not self.size:
            return
        strides = [DTYPES[self.kind].bits // 8] * self.ndim
        for axis in range(self.ndim - 2, -1, -1):
            strides[axis] = strides[axis + 1] * self._whole[axis + 1]
        inner = self.ndim  # The first axis from which on the part is whole.
        while inner and self._spans[inner - 1] == (0, self._whole[inner - 1]):
            inner -= 1
        offset = self._offset + sum(
            start * step for (start, _), step in zip(self._spans, strides, strict=True)
        )
        if not inner:
            yield offset, 1, self.nbytes, self.nbytes
            return
        start, stop = self._spans[inner - 1]
        length = (stop - start) * strides[inner - 1]
        outer = self.shape[: inner - 1]
        if not outer:
            yield offset, 1, length, length
            return
        *further, rows = outer
        for index in np.ndindex(*further):
            begin = sum(n * step for n, step in zip(index, strides, strict=False))
            yield offset + begin, rows, strides[inner - 2], length


class StoredTensors(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint's files, by the names of a plan; nothing is read.

    Files are opened when they are first asked for a tensor, and once.

    Attributes:
        folder: the checkpoint's folder.
        infos: name → description.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        names: TensorNames | None = None,
        *,
        stamps: FileStamps | None = None,
        gap: int = GAP,
    ) -> None:
        """Describe the tensors.

        Args:
            folder: the checkpoint's folder.
            tensors: name → description with its file, by the names of the plan.
            names: changes between the names in the files and those in the plan.
            stamps: what the files were when the headers were read, if that is known.
            gap: bytes between two runs that are read rather than skipped.
        """
        self.folder, self.infos = folder, tensors
        self._gap, self._stamps = gap, FileStamps() if stamps is None else stamps
        names = names or TensorNames()
        self._origin = {new: old for old, new in names.renamed}
        for copy, source in names.copies:
            self._origin[copy] = self._origin.get(source, source)
        self._counter = Counter()
        self._files: dict[str, tuple[StoredFile, dict[str, Location]]] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that have been read so far."""
        return self._counter.value

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __getitem__(self, name: str) -> StoredTensor:
        """Return a tensor.

        Raises:
            KeyError: there is no such tensor.
            CheckpointFileError: its file is not readable, or does not hold it as described.
        """
        info = self.infos[name]
        if info.file not in self._files:
            stamp = self._stamps.files.get(info.file)
            opened_file = StoredFile(self.folder / info.file, self._counter, stamp)
            self._files[info.file] = opened_file, opened_file.locations()
        file, locations = self._files[info.file]
        location = locations.get(self._origin.get(name, name))
        if location is None or location.info != info:
            found = "no such tensor" if location is None else _words(location.info)
            raise CheckpointFileError(
                f"{info.file}: it has {found} under {name}, where {_words(info)} was expected as "
                "when the headers were read; something writes to the checkpoint, so load it "
                "again when that has ended."
            )
        return StoredTensor(file, name, location, self._gap)


def _words(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def as_array(source: Any) -> mx.array:
    """Return an array, read if it is a ``StoredTensor``."""
    return source.read() if isinstance(source, StoredTensor) else source


def copied_bytes(array: mx.array) -> Bytes:
    """Return the bytes of an evaluated array ``uint8 [nbytes]``, a copy only if there is no view.

    Another device than the CPU may have memory of its own.
    """
    unsigned = array.view(_UNSIGNED[array.dtype.size])
    mx.eval(unsigned)
    return np.asarray(unsigned).reshape(-1).view(np.uint8)


def bytes_of(array: mx.array) -> Bytes:
    """Return a writable view ``uint8 [nbytes]`` of an array's memory; the array is evaluated.

    The view keeps the memory alive. No pending operation may read or write the array.
    """
    unsigned = array.view(_UNSIGNED[array.dtype.size])
    mx.eval(array, unsigned)
    return np.array(unsigned, copy=False).reshape(-1).view(np.uint8)
