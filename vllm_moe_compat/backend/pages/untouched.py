"""Arrays of zeros whose memory is not touched until it is used.

The operating system gives memory when a process first writes to it. ``mx.zeros`` writes all of
it, so a pool of pages would take its full size from the machine at once, however few requests
come. MLX has no other way to allocate (its ``empty`` is ``zeros``, and it copies what it imports),
with one exception: an array read from a Python file object, which may leave the memory as it is.

* In an engine process of vLLM's, the array is "read" from an object that writes nothing.
* In a process that others share, that could hang: MLX's thread needs Python's lock to read, and
  another thread may hold it in ``mx.clear_cache``, which waits for MLX's thread. There the zeros
  are written, and their memory is given back to the operating system.

In both cases the memory is given back explicitly, which makes it read as zeros. That is a property
of private memory on Linux, so elsewhere, and on GPUs, zeros are written.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import multiprocessing
import sys
from typing import Any

import mlx.core as mx
import numpy as np


def is_supported() -> bool:
    """Return whether memory of MLX's device can stay untouched."""
    return sys.platform == "linux" and mx.default_device().type == mx.DeviceType.cpu


def zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return evaluated zeros; where that is supported, almost none of their memory is resident."""
    if is_supported() and multiprocessing.parent_process() is not None:
        # numpy has the unsigned integers of which pools consist under the same names.
        name = str(dtype).rpartition(".")[2]
        array: mx.array = mx.load(_Nothing(shape, np.dtype(name)), format="npy")  # type: ignore
        mx.eval(array)
        return array
    array = mx.zeros(shape, dtype=dtype)
    mx.eval(array)
    if is_supported():
        _give_back(memoryview(array))  # type: ignore[arg-type]
    return array


def address(array: mx.array) -> int:
    """Return where the memory of an evaluated array begins."""
    data = np.frombuffer(memoryview(array).cast("B"), dtype=np.uint8)  # type: ignore[arg-type]
    return int(data.ctypes.data)


class _Nothing(io.RawIOBase):
    """A file in numpy's format: a header, then zeros that are not written."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        header = io.BytesIO()
        facts = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, facts)  # type: ignore[no-untyped-call]
        self._header = header.getvalue()
        self._at = 0
        self._end = len(self._header) + int(np.prod(shape)) * dtype.itemsize

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = len(buffer)
        if self._at < len(self._header):
            buffer[:] = self._header[self._at : self._at + count]
        else:
            _give_back(buffer)
        self._at += count
        return count


def _give_back(buffer: memoryview) -> None:
    """Make a buffer read as zeros: its whole memory pages are given back, the edges are written.

    Raises:
        OSError: the operating system refuses.
    """
    data = np.frombuffer(buffer.cast("B"), dtype=np.uint8)
    start, stop = data.ctypes.data, data.ctypes.data + data.nbytes
    first = min(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop)
    last = max(stop // mmap.PAGESIZE * mmap.PAGESIZE, first)
    ctypes.memset(start, 0, first - start)
    ctypes.memset(last, 0, stop - last)
    if first == last:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    whole = (ctypes.c_void_p(first), ctypes.c_size_t(last - first))
    if libc.madvise(*whole, mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")
