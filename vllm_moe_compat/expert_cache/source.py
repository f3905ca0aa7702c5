"""Read single experts of one container from the checkpoint's files.

A container's builds say how all its experts are made. For one expert each is restricted to that
expert, so only its bytes are read, and what is made of them is bit for bit what a whole load makes.

Reads run on a small pool of threads, MLX on the calling thread. Where the stored bytes are the held
bytes (floats in the slots' dtype, the words of MLX's own formats), they are read straight into the
slot (``plain_bytes``), and so is FP4 (``held_bytes``); FP8 is dequantised into it (``written``).
Everything else is read into memory of its own, made by the plan's operations and copied; only a few
experts are ever on that way.

Nothing tells that bytes are still those of the load but their file's size and time. So after the
reads the files of a call are looked at, and an expert from a file that changed has failed. An equal
header would not do: other values would silently be other answers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

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
    copied_bytes,
)
from vllm_moe_compat.expert_cache.held_bytes import HeldBytes, held_bytes
from vllm_moe_compat.expert_cache.plain_bytes import PlainBytes, plain_bytes
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.expert_cache.read_tasks import Task, start
from vllm_moe_compat.expert_cache.written import Written, written
from vllm_moe_compat.plan.build import Build, Restriction

_WAITING = 2**24
"""Limit for bytes of experts that were read and wait for MLX, at least two experts."""


@dataclass(slots=True)
class _Expert:
    """One expert on its way.

    Attributes:
        number: its number.
        tasks: what to read.
        finish: what MLX makes of it, on the calling thread: memory and the array to copy there.
        waiting: bytes that are held until then.
        turns: of the pool.
    """

    number: int
    tasks: list[Task] = field(default_factory=list)
    finish: list[Callable[[], list[tuple[Bytes, mx.array]]]] = field(default_factory=list)
    waiting: int = 0
    turns: list[Future[None]] = field(default_factory=list)

    @property
    def files(self) -> list[StoredFile]:
        """The files that it is read from."""
        return list(dict.fromkeys(t.file for task in self.tasks for t in task.tensors))


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
        self._direct: list[PlainBytes | HeldBytes | Written] = []
        self._made: list[PackedBuild] = []
        counts = set()
        for packed in builds:
            names = [name.removeprefix(f"{path}.") for name in packed.names]
            counts.add(packed.build.results(stored.infos, "BF16")[0].shape[0])
            for name in packed.build.sources:
                stored[name]  # A file that is not the described one ends the load, not a request.
            for kind in (plain_bytes, held_bytes, written):
                if (found := kind(packed, names, stored, self.specs)) is not None:
                    self._direct.append(found)
                    break
            else:
                self._made.append(packed)
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
                one.turns = start(one.tasks)
                ways.append(one)
                while len(ways) > 2 and sum(w.waiting for w in ways) > _WAITING:
                    read += self._finish(ways.popleft(), failed)
            while ways:
                read += self._finish(ways.popleft(), failed)
        finally:
            wait([turn for one in ways for turn in one.turns])
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
        for found in self._direct:
            one.tasks += found.tasks(number, views)
        for packed in self._made:
            build = packed.build.restricted(Restriction(experts=(number, number + 1)))
            sources = {name: self._stored[name] for name in build.sources}
            operand = take_unread(build, sources)
            buffers = Arrays(
                [_Buffer(tensor) for tensor in operand.weights],
                {role: [_Buffer(t) for t in each] for role, each in operand.parts.items()},
            )
            everything = [*buffers.weights, *(b for each in buffers.parts.values() for b in each)]
            one.tasks += [Task([buffer.tensor], buffer.read) for buffer in everything]
            one.waiting += sum(buffer.tensor.nbytes for buffer in everything)
            one.finish.append(self._making(packed, build, buffers, views))
        return one

    def _making(
        self, packed: PackedBuild, build: Build, buffers: Arrays, views: Mapping[str, Bytes]
    ) -> Callable[[], list[tuple[Bytes, mx.array]]]:
        def make() -> list[tuple[Bytes, mx.array]]:
            operand = Arrays(
                [buffer.array() for buffer in buffers.weights],
                {role: [b.array() for b in each] for role, each in buffers.parts.items()},
            )
            try:
                made = run_build(
                    build, operand, packed.dtype, names=packed.names, formats=packed.formats
                )
            except CompatError as error:
                raise failure(build, error, self._file_of) from error
            placed = []
            for name, array in made.items():
                key = name.removeprefix(f"{self.path}.")
                spec = self.specs[key]
                rounded = array.astype(spec.rounded or spec.dtype)
                held = mx.contiguous(rounded.astype(spec.dtype).reshape(spec.shape))
                placed.append((views[key], held))
            return placed

        return make

    def _finish(self, one: _Expert, failed: dict[int, CompatError]) -> Iterator[_Expert]:
        """Wait for the reads and run what follows; yield the expert unless it failed."""
        wait(one.turns)
        try:
            for turn in one.turns:
                turn.result()
            # What is left to evaluate is evaluated together, since MLX's thread answers late.
            placed = [pair for finish in one.finish for pair in finish()]
            mx.eval([array for _, array in placed])
            for target, array in placed:
                target[:] = copied_bytes(array)
        except CompatError as error:
            failed[one.number] = self._named(one.number, error)
            return
        except (RuntimeError, ValueError, MemoryError) as error:
            build = self._made[0].build if self._made else self._direct[0].packed.build
            failed[one.number] = self._named(one.number, failure(build, error, self._file_of))
            return
        yield one

    @property
    def _file_of(self) -> dict[str, str]:
        return {name: info.file for name, info in self._stored.infos.items()}

    def _named(self, number: int, error: CompatError) -> CompatError:
        return type(error)(f"expert {number} of {self.path}: {error}")


class _Buffer:
    """Memory for a part of a file, which is read on the pool and given to MLX afterwards."""

    def __init__(self, tensor: StoredTensor) -> None:
        self.tensor = tensor
        self._bytes = np.empty(tensor.nbytes, np.uint8)

    def read(self) -> None:
        self.tensor.read_into(self._bytes)

    def array(self) -> mx.array:
        """Return the values; nothing is evaluated."""
        return mx.array(self._bytes).view(self.tensor.dtype).reshape(self.tensor.shape)
