"""Read single experts of one container from the checkpoint's files.

A container's builds say how all its experts are made. For one expert each is restricted to that
expert, so only its bytes are read, and what is made of them is bit for bit what a whole load makes.

Reads run on a small pool of threads, arithmetic on the calling thread. Where the stored bytes are
the held bytes (floats in the slots' dtype, the words of MLX's own formats), they are read straight
into the slot. Everything else is read into memory of its own, dequantised or packed by the plan's
operations and copied; only a few experts are ever on that way.

Nothing tells that bytes are still those of the load but their file's size and time. So after the
reads the files of a call are looked at, and an expert from a file that changed has failed. An equal
header would not do: other values would silently be other answers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx

from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.execute.build_tensor import run_build, take_unread
from vllm_moe_compat.execute.quantize import PackedBuild
from vllm_moe_compat.execute.run_plan import failure
from vllm_moe_compat.execute.stack import Arrays
from vllm_moe_compat.execute.stored_tensors import (
    Bytes,
    StoredFile,
    StoredTensor,
    StoredTensors,
    bytes_of,
)
from vllm_moe_compat.expert_cache.plain_bytes import Plain, plain
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.plan.build import Build, Restriction

THREADS = 8
"""Reads at once: enough for a disk to be busy; in the page's cache two cores do the copying."""
_TASK = 2**18
"""Bytes that are worth a task of their own on the pool."""
_WAITING = 2**24
"""Limit for bytes of experts that were read and wait for arithmetic, at least two experts."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="read-experts")


@dataclass(slots=True)
class _Expert:
    """One expert on its way.

    Attributes:
        number: its number.
        reads: what to read, and where to.
        finish: what to do with it afterwards, on the calling thread.
        waiting: bytes that are held until then.
        tasks: reads on the pool.
    """

    number: int
    reads: list[tuple[StoredTensor, Bytes]] = field(default_factory=list)
    finish: list[Callable[[], None]] = field(default_factory=list)
    waiting: int = 0
    tasks: list[Future[None]] = field(default_factory=list)

    def start(self) -> None:
        """Begin to read."""
        task: list[tuple[StoredTensor, Bytes]] = []
        size = 0
        for tensor, target in self.reads:
            task.append((tensor, target))
            size += tensor.nbytes
            if size >= _TASK:
                self.tasks.append(_pool().submit(_read, task))
                task, size = [], 0
        if task:
            self.tasks.append(_pool().submit(_read, task))

    @property
    def files(self) -> list[StoredFile]:
        """The files that it is read from."""
        return list(dict.fromkeys(tensor.file for tensor, _ in self.reads))


def _read(task: Sequence[tuple[StoredTensor, Bytes]]) -> None:
    for tensor, target in task:
        tensor.read_into(target)


class FileSource:
    """The experts of one container in the checkpoint's files; an ``ExpertSource``.

    Attributes:
        experts: E.
        specs: ``gate_proj.weight`` → shape without E and dtype in memory.
        nbytes: bytes of one expert in memory.
    """

    def __init__(
        self,
        stored: StoredTensors,
        path: str,
        builds: Sequence[PackedBuild],
        specs: Mapping[str, Spec],
    ) -> None:
        """Describe the experts; nothing is read.

        Args:
            stored: the checkpoint's files.
            path: of the container in the model, the beginning of the builds' names.
            builds: of all parameters in ``specs``.
            specs: ``gate_proj.weight`` → shape without E and dtype in memory.

        Raises:
            CheckpointFileError: a file is not as its header described it.
        """
        self.path, self.specs = path, dict(specs)
        self.nbytes = sum(math.prod(spec.shape) * spec.dtype.size for spec in specs.values())
        self._stored = stored
        self._plain: list[Plain] = []
        self._made: list[PackedBuild] = []
        counts = set()
        for packed in builds:
            names = [name.removeprefix(f"{path}.") for name in packed.names]
            counts.add(packed.build.results(stored.infos, "BF16")[0].shape[0])
            for name in packed.build.sources:
                stored[name]  # A file that is not the described one ends the load, not a request.
            found = plain(packed, names, stored, self.specs)
            if found is None:
                self._made.append(packed)
            else:
                self._plain.append(found)
        (self.experts,) = counts

    def read(
        self, experts: Sequence[int], into: Callable[[int], Mapping[str, Bytes]]
    ) -> dict[int, CompatError]:
        """Write each expert's parameters into ``into(expert)``.

        Args:
            experts: their numbers.
            into: returns writable, contiguous bytes for every spec.

        Returns:
            The experts that could not be read. Their bytes may be half written.
        """
        failed: dict[int, CompatError] = {}
        ways: deque[_Expert] = deque()
        checked: dict[StoredFile, CompatError | None] = {}
        read: list[_Expert] = []
        try:
            for number in experts:
                try:
                    one = self._prepare(number, into(number))
                except CompatError as error:
                    failed[number] = self._named(number, error)
                    continue
                one.start()
                ways.append(one)
                while len(ways) > 2 and sum(w.waiting for w in ways) > _WAITING:
                    read += self._finish(ways.popleft(), failed)
            while ways:
                read += self._finish(ways.popleft(), failed)
        finally:
            wait([task for one in ways for task in one.tasks])
        for one in read:
            for file in one.files:
                if file not in checked:
                    checked[file] = file.changed()
                if (found := checked[file]) is not None:
                    failed[one.number] = self._named(one.number, found)
        return failed

    def _prepare(self, number: int, views: Mapping[str, Bytes]) -> _Expert:
        """Return the reads of one expert, and what follows them."""
        one = _Expert(number)
        for found in self._plain:
            reads, finish = found.prepare(number, views)
            one.reads += reads
            if finish is not None:
                one.finish.append(finish)
                one.waiting += sum(tensor.nbytes for tensor, _ in reads)
        for packed in self._made:
            build = packed.build.restricted(Restriction(experts=(number, number + 1)))
            sources = {name: self._stored[name] for name in build.sources}
            operand = take_unread(build, sources)
            weights = [_allocated(w, one) for w in operand.weights]
            parts = {
                role: [_allocated(part, one) for part in each]
                for role, each in operand.parts.items()
            }
            one.finish.append(self._making(packed, build, Arrays(weights, parts), views))
        return one

    def _making(
        self, packed: PackedBuild, build: Build, operand: Arrays, views: Mapping[str, Bytes]
    ) -> Callable[[], None]:
        def make() -> None:
            made = run_build(
                build, operand, packed.dtype, names=packed.names, formats=packed.formats
            )
            for name, array in made.items():
                key = name.removeprefix(f"{self.path}.")
                spec = self.specs[key]
                held = mx.contiguous(array.astype(spec.dtype).reshape(spec.shape))
                views[key][:] = bytes_of(held)

        return make

    def _finish(self, one: _Expert, failed: dict[int, CompatError]) -> Iterator[_Expert]:
        """Wait for the reads and run what follows; yield the expert unless it failed."""
        wait(one.tasks)
        try:
            for task in one.tasks:
                task.result()
            for finish in one.finish:
                finish()
        except CompatError as error:
            failed[one.number] = self._named(one.number, error)
            return
        except (RuntimeError, ValueError, MemoryError) as error:
            build = self._made[0].build if self._made else self._plain[0].packed.build
            files = {name: info.file for name, info in self._stored.infos.items()}
            failed[one.number] = self._named(one.number, failure(build, error, files))
            return
        yield one

    def _named(self, number: int, error: CompatError) -> CompatError:
        return type(error)(f"expert {number} of {self.path}: {error}")


def _allocated(source: Any, one: _Expert) -> mx.array:
    """Return the memory for a part of a file, which is read later."""
    array = mx.zeros(source.shape, dtype=source.dtype)
    one.reads.append((source, bytes_of(array)))
    one.waiting += array.nbytes
    return array
