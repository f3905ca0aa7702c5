"""Page pools: the memory that vLLM's block ids address.

vLLM plans one pool of ``num_blocks`` pages per layer *position*: the first layers of all groups
(full attention, sliding window, states) share a pool, since a block id belongs to one group at a
time. An MLX array has one dtype and cannot alias another, so a pool holds raw unsigned integers
as wide as the model's dtype, and keys, values and states are viewed as such on the way in and
out. The bytes reported to vLLM are therefore the bytes allocated.

MLX writes into a buffer in place only if nothing else references it when the write is scheduled;
otherwise it copies the whole pool. Hence three rules: ``pages`` is the only reference and every
write replaces it; reads follow the writes of the same evaluation; a read is evaluated before the
next write is scheduled.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vllm_moe_compat.backend.pages import untouched
from vllm_moe_compat.load import claims

RAW_DTYPES = {2: mx.uint16, 4: mx.uint32}
"""Bytes per element → dtype of the pool."""


class PagePool:
    """``pages [num_blocks, page_elements]`` of raw integers, zero at first.

    Block 0 is vLLM's null block: it is never written, so padded block tables read zeros.
    """

    def __init__(self, num_blocks: int, page_bytes: int, dtype: mx.Dtype) -> None:
        if page_bytes % dtype.size:
            raise ValueError(f"a page of {page_bytes} bytes does not hold whole {dtype} elements")
        self.num_blocks = num_blocks
        self.raw = RAW_DTYPES[dtype.size]
        self._shape = (num_blocks, page_bytes // dtype.size)
        # Not evaluated: a pool that only shapes a graph takes no memory.
        self.pages = mx.zeros(self._shape, dtype=self.raw)
        self._unclaim: weakref.finalize[..., PagePool] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return int(self.pages.nbytes)

    @property
    def full_bytes(self) -> int:
        """Bytes that ``allocate`` takes."""
        return self._shape[0] * self._shape[1] * int(self.raw.size)

    def allocate(self) -> None:
        """Allocate all pages anew, of zeros; where possible, they are not touched before use.

        Other engines count that memory as taken until it is released, or this object is gone.
        """
        self.release()
        self.pages = untouched.zeros(self._shape, self.raw)
        if untouched.is_supported():
            # Every write is in place, so the memory stays where it is.
            address = untouched.address(self.pages)
            self._unclaim = weakref.finalize(self, claims.claim(address, self.nbytes))

    def release(self) -> None:
        """Give the memory of all pages back; ``allocate`` must follow before they are used."""
        self.pages = mx.zeros((0, self._shape[1]), dtype=self.raw)
        if self._unclaim is not None:
            self._unclaim()

    def zero(self, blocks: Sequence[int]) -> None:
        """Write zeros over whole pages, so that stale bits cannot be read as NaN."""
        if len(blocks):
            self.pages[mx.array(np.asarray(blocks, dtype=np.uint32))] = mx.array(0, dtype=self.raw)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, destination): vLLM's copy-on-write of a shared block."""
        if pairs:
            table = np.asarray(pairs, dtype=np.uint32)
            sources = self.pages[mx.array(table[:, 0])]
            # The pending read references the buffer; evaluate it before the write is scheduled.
            mx.eval(sources)
            self.pages[mx.array(table[:, 1])] = sources

    def write_head(self, blocks: mx.array, values: mx.array) -> None:
        """Write raw ``values [B, n]`` to the first n elements of the pages ``blocks [B]``."""
        self.pages[blocks, : values.shape[1]] = values

    def read_head(self, blocks: mx.array, count: int) -> mx.array:
        """Return the first ``count`` raw elements of the pages ``blocks [B]``: ``[B, count]``."""
        return self.pages[blocks, :count]

    def write_rows(self, rows: mx.array, values: mx.array) -> None:
        """Write raw ``values [..., D]`` at ``rows [...]`` of the pool seen as ``[-1, D]``."""
        shape = self.pages.shape
        flat = self.pages.reshape(-1, values.shape[-1])
        flat[rows] = values
        self.pages = flat.reshape(shape)

    def read_runs(self, runs: mx.array, length: int, width: int) -> mx.array:
        """Return raw runs of ``length`` rows: ``runs [...]`` → ``[..., length, width]``."""
        return self.pages.reshape(-1, length, width)[runs]
