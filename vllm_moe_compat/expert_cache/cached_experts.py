"""A container of experts that holds a share of them, and reads the others when they are chosen.

``CachedExperts`` takes the place of mlx-lm's ``SwitchGLU`` or ``SwitchMLP``. Inside it is
upstream's own container, whose layers have ``C`` rows, the slots, instead of ``E``. A call reads
the router's choice back, has missing experts read into slots, and calls upstream's code with
slots in place of experts. So the numbers are those of the resident container, bit for bit on the
same kernels: each pair of token and expert is the same product of the same numbers.

A pass that wants more experts than fit goes by groups of experts (``Policy.plan``). Each group
computes its own pairs and is evaluated before the next one is read, so an expert is read at most
once per pass.

Once all experts of a container are in slots, nothing is read back, and the graph is built as
without a cache.

Axes: ``N`` tokens, ``k`` experts of each, ``D`` width of a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.errors import CompatError, LayoutError, SettingError
from vllm_moe_compat.expert_cache.counters import Counters, counters_of
from vllm_moe_compat.expert_cache.current_pass import (
    CurrentPass,
    is_building_only,
    running_pass,
)
from vllm_moe_compat.expert_cache.policy import Group, Policy
from vllm_moe_compat.expert_cache.protocol import ExpertSource
from vllm_moe_compat.expert_cache.slots import Pending, Slots
from vllm_moe_compat.expert_cache.transformations import forward_only, refuse_tracing

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Choice:
    """The router's choice in one pass.

    Attributes:
        experts: int64 ``[N, k]``.
        real: which tokens are no padding, bool ``[N]``; None if all are.
        current: takes note of rows that cannot be computed; None where nobody does.
    """

    experts: Ints
    real: npt.NDArray[np.bool_] | None
    current: CurrentPass | None

    def fail(self, failed: dict[int, CompatError]) -> None:
        """Fail the rows that need one of the ``failed`` experts.

        Raises:
            CompatError: nobody takes note.
        """
        for expert, error in failed.items():
            if self.current is None:
                raise error
            needs = (self.experts == expert).any(axis=-1)
            if self.real is not None:
                needs &= self.real
            self.current.fail(np.flatnonzero(needs), error)


class ExpertsOnDiskError(SettingError, AttributeError):
    """A layer of experts was asked for as a whole."""


class CachedExperts(nn.Module):  # type: ignore[misc]
    """Experts of one layer, ``C`` of ``E`` in memory.

    Its slots are no parameters: ``load_weights``, ``nn.quantize`` and casts do not see them.
    What else the container has (its activation, a norm) stays a child.

    Attributes:
        layer: path of the container in the model.
        experts: E.
        slots: C.
        counters: of this layer.
    """

    def __init__(
        self,
        container: nn.Module,
        source: ExpertSource,
        slots: int,
        *,
        layer: str,
        pending: Pending | None = None,
        in_place: bool | None = None,
    ) -> None:
        """Take over ``container``, whose experts need not have been loaded.

        Args:
            container: upstream's; its layers have the classes and formats of ``source.specs``.
            source: reads experts.
            slots: C; more than E counts as E.
            layer: its path, for counters and messages.
            pending: one for all containers of a model.
            in_place: how slots are written; None asks the device (``Slots``).

        Raises:
            LayoutError: the source does not have exactly the parameters of the layers.
        """
        super().__init__()
        layers = _expert_layers(container, source, layer)
        for name, child in container.items():
            if name not in layers:
                self[name] = child
        self.layer, self.experts, self.slots = layer, source.experts, min(slots, source.experts)
        self.counters: Counters = counters_of(layer)
        self._layers = frozenset(layers)
        self._source, self._policy = source, Policy(self.slots, self.experts)
        self._slots = Slots(layers, source.specs, self.slots, in_place=in_place)
        self._pending = pending or Pending()
        self._unread: set[int] = set()
        # A bound method: the container itself would be found among the module's children.
        self._call: Callable[[mx.array, mx.array], mx.array] = container.__call__
        self._rows_of: Callable[[mx.array], mx.array] | None = None

    def __getattr__(self, name: str) -> Any:
        """Return a child; a layer of experts is none, whoever wants to shard or change it.

        Raises:
            ExpertsOnDiskError: the container had such a layer.
        """
        if name in self.__dict__.get("_layers", ()):
            raise ExpertsOnDiskError(
                f"{EXPERT_CACHE.name}={EXPERT_CACHE.read()}: only a share of the experts of "
                f"{self.layer} is in memory, so nobody can be given its {name}; set it to off to "
                "shard or change the model."
            )
        return super().__getattr__(name)

    @property
    def resident(self) -> bool:
        """Whether every expert is in a slot, so that no call reads anything."""
        return self._rows_of is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self._slots.nbytes

    @property
    def source(self) -> ExpertSource:
        """What reads its experts."""
        return self._source

    def close(self) -> None:
        """Give slots and files back, whoever still holds this module; it cannot be called then."""
        for name in ("_source", "_slots", "_pending", "_call", "_rows_of"):
            self.__dict__.pop(name, None)

    def fill(self) -> None:
        """Read all experts, if there is a slot for each; from then on no call reads anything.

        Raises:
            CompatError: an expert cannot be read.
        """
        if self.slots < self.experts or self.resident:
            return
        self._pending.evaluate()
        everyone = np.arange(self.experts)
        with self._planned(everyone, np.ones_like(everyone)) as groups:
            for group in groups:
                for error in self._fetch(group).values():
                    raise error

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Compute the chosen experts of each token.

        Args:
            x: ``[…, D]``.
            indices: chosen experts, ``[…, k]``.

        Returns:
            ``[…, k, D]``.

        Raises:
            CompatError: an expert cannot be read, and no ``current_pass`` takes note of it.
            SettingError: the call is part of a function that MLX transforms.
        """
        if is_building_only():
            return self._call(x, mx.zeros_like(indices))
        if self._rows_of is not None:
            return self._call(x, self._rows_of(indices))
        with refuse_tracing():
            self._pending.evaluate(indices)
        x = forward_only(x)
        choice = _choice(np.array(indices))
        needed = choice.experts if choice.real is None else choice.experts[choice.real]
        tokens_of = np.bincount(needed.reshape(-1), minlength=self.experts)
        wanted = np.flatnonzero(tokens_of)
        uses = tokens_of[wanted]
        with self._planned(wanted, uses) as groups:
            if len(groups) == 1:
                result = self._at_once(x, indices.shape, choice, groups[0])
            else:
                result = self._by_groups(x, indices.shape, choice, groups)
        if result is None:  # Not one expert could be read.
            like = self._call(x, mx.zeros_like(indices))
            result = mx.zeros(like.shape, dtype=like.dtype)
        return result

    def _at_once(
        self, x: mx.array, shape: tuple[int, ...], choice: _Choice, group: Group
    ) -> mx.array | None:
        """Compute all pairs in one call of upstream's code, which is not evaluated."""
        choice.fail(self._fetch(group))
        slot_of = self._policy.slot_of
        rows = slot_of[choice.experts]
        if (rows < 0).any():
            held = slot_of[slot_of >= 0]
            if not len(held):
                return None
            # Padding, and what could not be read, takes any expert.
            rows[rows < 0] = held[0]
        result = self._call(x, mx.array(rows.astype(np.uint32)).reshape(shape))
        self._pending.set(result)
        if choice.current is not None:  # What the pass did not evaluate, nobody will.
            choice.current.at_end.add(self._pending.clear)
        return result

    def _by_groups(
        self, x: mx.array, shape: tuple[int, ...], choice: _Choice, groups: Sequence[Group]
    ) -> mx.array | None:
        """Compute the pairs of each group by themselves; evaluated. Padding becomes zero."""
        tokens, chosen = choice.experts.shape
        x = mx.broadcast_to(x, (*shape[:-1], x.shape[-1])).reshape(tokens, -1)
        result: mx.array | None = None
        for group in groups:
            failed = self._fetch(group)
            choice.fail(failed)
            slot_of = np.full(self.experts, -1)
            slot_of[group.experts] = group.slots
            slot_of[list(failed)] = -1
            rows = slot_of[choice.experts]
            if choice.real is not None:
                rows[~choice.real] = -1
            rows = rows.reshape(-1)
            pairs = np.flatnonzero(rows >= 0)
            if not len(pairs):
                continue
            taken = x[mx.array((pairs // chosen).astype(np.uint32))]
            part = self._call(taken, mx.array(rows[pairs].astype(np.uint32))[:, None])[:, 0]
            if result is None:
                result = mx.zeros((tokens * chosen, part.shape[-1]), dtype=part.dtype)
            result[mx.array(pairs.astype(np.uint32))] = part
            del taken, part  # ``result`` is then the only reference, and is updated in place.
            mx.eval(result)
        return None if result is None else result.reshape(*shape, -1)

    @contextmanager
    def _planned(self, wanted: Ints, uses: Ints) -> Iterator[list[Group]]:
        """Plan a pass; what it has not read at its end has no slot."""
        groups = self._policy.plan(wanted, uses)
        self._unread = {expert for group in groups for expert, _ in group.missing}
        self.counters.passes += 1
        self.counters.groups += len(groups)
        self.counters.hits += len(wanted) - len(self._unread)
        self.counters.misses += len(self._unread)
        try:
            yield groups
        finally:
            for expert in self._unread:
                self._policy.forget(expert)
        if self.slots == self.experts and (self._policy.slot_of >= 0).all():
            self._rows_of = _translation(self._policy.slot_of)

    def _fetch(self, group: Group) -> dict[int, CompatError]:
        """Read a group's missing experts; return those that could not be read.

        Whatever reads the slots is evaluated.
        """
        if not group.missing:
            return {}
        begin = time.perf_counter()
        failed = self._slots.fill(group.missing, self._source)
        self.counters.seconds_waited += time.perf_counter() - begin
        self.counters.bytes_read += (len(group.missing) - len(failed)) * self._source.nbytes
        self.counters.failures += len(failed)
        self._unread -= {expert for expert, _ in group.missing} - failed.keys()
        for expert in failed:
            self._policy.forget(expert)
        return failed


def _choice(indices: npt.NDArray[Any]) -> _Choice:
    """Return the choice ``[…, k]``, with what the current pass says of it."""
    experts = indices.reshape(-1, indices.shape[-1]).astype(np.int64)
    current = running_pass()
    if current is None or current.real.size != len(experts):  # Called on part of the batch.
        return _Choice(experts, None, None)
    return _Choice(experts, current.real.reshape(-1), current)


def _translation(slot_of: Ints) -> Callable[[mx.array], mx.array]:
    """Return the function from experts to their slots."""
    if (slot_of == np.arange(len(slot_of))).all():
        return lambda experts: experts
    table = mx.array(slot_of.astype(np.uint32))
    mx.eval(table)
    return lambda experts: table[experts]


def _expert_layers(container: nn.Module, source: ExpertSource, layer: str) -> dict[str, nn.Module]:
    """Return the layers of ``container`` that have an axis of experts."""
    layers = {
        name: child
        for name, child in container.items()
        if isinstance(child, SwitchLinear | QuantizedSwitchLinear)
    }
    expected = {
        f"{name}.{key}"
        for name, child in layers.items()
        for key, _ in tree_flatten(child.parameters())
    }
    if expected != set(source.specs):
        raise LayoutError(
            f"{layer}: its experts have the parameters {sorted(expected)}, and "
            f"{sorted(source.specs)} can be read; set VLLM_MOE_COMPAT_EXPERT_CACHE=off and report "
            "the checkpoint."
        )
    return layers
