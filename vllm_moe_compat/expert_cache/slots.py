"""Memory for a share of a layer's experts.

``C`` slots stand in the place of ``E`` experts: every parameter with an axis of experts becomes
one array ``[C, …]``, allocated once. An expert is written into its slot in place. Where the
device computes in the host's memory (CPU, Metal), bytes are written through a view of the array's
own memory: no graph, no copy. Elsewhere they are staged and copied by a slice update, which MLX
does in place while nothing else refers to the array.

Whoever reads the slots has to be evaluated before they are written (``Pending``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.execute.stored_tensors import bytes_of
from vllm_moe_compat.expert_cache.protocol import Bytes, ExpertSource, Spec

_STAGED = 2**26
"""Bytes that are staged at once, at least one expert."""


class Pending:
    """The last result that may still have to read slots, shared by a model's containers.

    A container reads the router's choice back in every pass. At that moment the result of the
    container before it is evaluated, too, so no more than one result is ever pending.
    """

    def __init__(self) -> None:
        self._result: mx.array | None = None

    def set(self, result: mx.array) -> None:
        """``result`` reads slots and may not be evaluated."""
        self._result = result

    def evaluate(self, *arrays: mx.array) -> None:
        """Evaluate ``arrays``, and what is pending."""
        result, self._result = self._result, None
        mx.eval(arrays, () if result is None else result)

    def clear(self) -> None:
        """Forget what is pending: nobody will evaluate it."""
        self._result = None


class Slots:
    """The slots of one container.

    Attributes:
        count: C.
        nbytes: bytes of all slots.
        in_place: whether slots are written through a view of their memory.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        specs: Mapping[str, Spec],
        count: int,
        *,
        in_place: bool | None = None,
    ) -> None:
        """Allocate the slots as parameters of ``layers``.

        Args:
            layers: ``gate_proj`` → the module that computes with it.
            specs: ``gate_proj.weight`` → its spec.
            count: C.
            in_place: how slots are written; None asks the device.
        """
        self.count = count
        self.in_place = _shares_memory() if in_place is None else in_place
        self._specs = dict(specs)
        self._homes: dict[str, tuple[Any, str]] = {}
        self._views: dict[str, Bytes] = {}
        for name, spec in specs.items():
            path, _, key = name.rpartition(".")
            layer: Any = layers[path]
            layer[key] = array = mx.zeros((count, *spec.shape), dtype=spec.dtype)
            mx.eval(array)
            self._homes[name] = layer, key
            if self.in_place:
                self._views[name] = bytes_of(array).reshape(count, -1)
        self._sizes = {
            name: prod(spec.shape) * spec.dtype.size for name, spec in self._specs.items()
        }
        self.nbytes = count * sum(self._sizes.values())

    def fill(
        self, placed: Sequence[tuple[int, int]], source: ExpertSource
    ) -> dict[int, CompatError]:
        """Read experts into slots.

        Args:
            placed: (expert, slot) of each.
            source: reads them.

        Returns:
            The experts that could not be read. Their slots may be half written.
        """
        if self.in_place:
            slot_of = dict(placed)

            def of(expert: int) -> dict[str, Bytes]:
                slot = slot_of[expert]
                return {name: view[slot] for name, view in self._views.items()}

            return dict(source.read([expert for expert, _ in placed], of))
        failed: dict[int, CompatError] = {}
        for part in self._parts(placed):
            failed |= self._fill_staged(part, source)
        return failed

    def _parts(self, placed: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
        size = max(1, _STAGED // (self.nbytes // self.count))
        for begin in range(0, len(placed), size):
            yield placed[begin : begin + size]

    def _fill_staged(
        self, placed: Sequence[tuple[int, int]], source: ExpertSource
    ) -> dict[int, CompatError]:
        staged = {
            expert: {name: np.empty(size, np.uint8) for name, size in self._sizes.items()}
            for expert, _ in placed
        }
        failed = dict(source.read(list(staged), staged.__getitem__))
        for name, spec in self._specs.items():
            layer, key = self._homes[name]
            array = layer[key]
            for expert, slot in placed:
                if expert not in failed:
                    value = mx.array(staged[expert].pop(name)).view(spec.dtype)
                    array[slot] = value.reshape(spec.shape)
            mx.eval(array)
        return failed


def _shares_memory() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu or mx.metal.is_available()
