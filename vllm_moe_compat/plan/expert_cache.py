"""How much memory the weights of routed experts take, and how many experts of a layer that holds.

Experts beyond the cache stay on disk. Each layer has *slots*, and a slot holds one expert in
the form in which it is computed: dequantised, quantised again, widened to float32, as the load
makes it. The slots are allocated once, so the sizes here are those of the running server.

A token needs all of its experts at once, so a layer never has fewer slots than that. Beyond it,
every layer gets the same share of its experts: nothing is known before a load about which layer's
routing is narrower. Whole slots leave a rest, which gives the first layers one more each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.errors import InsufficientMemoryError, SettingError

OFF = "off"
"""The value of ``VLLM_MOE_COMPAT_EXPERT_CACHE`` with which all experts stay in memory."""

_UNITS = {
    "b": 1,
    **{f"{prefix}ib": 1024**n for n, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", start=1)},
}
_AMOUNT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(%|[kmgt]?i?b)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The routed experts of one layer.

    Attributes:
        path: of the module that holds them: ``model.layers.0.mlp.switch_mlp``.
        experts: their number.
        nbytes: bytes of all of them, in the form in which they are computed.
        stored: bytes of all of them in the files; 0 if they are the same.
    """

    path: str
    experts: int
    nbytes: int
    stored: int = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one slot."""
        return -(-self.nbytes // self.experts)

    @property
    def expert_read(self) -> int:
        """Bytes to read from the files for one expert."""
        return -(-(self.stored or self.nbytes) // self.experts)


@dataclass(frozen=True, slots=True)
class CacheSetting:
    """The value of ``VLLM_MOE_COMPAT_EXPERT_CACHE``; not both are None.

    Attributes:
        words: the value as it was given.
        share: the part of all experts' bytes to keep, or None.
        nbytes: the bytes to keep, or None.
    """

    words: str
    share: Fraction | None = None
    nbytes: int | None = None

    @classmethod
    def read(cls) -> CacheSetting | None:
        """Return the setting in force; None if all experts stay in memory.

        Raises:
            SettingError: the value is neither ``off`` nor a share nor a size.
        """
        return parse(EXPERT_CACHE.read())

    def budget(self, full: int) -> int:
        """Return the bytes to keep, where all experts take ``full``."""
        if self.share is not None:
            return min(full, int(self.share * full))
        assert self.nbytes is not None
        return min(full, self.nbytes)


def parse(value: str) -> CacheSetting | None:
    """Return the setting that a value means; None for ``off``.

    A share is ``25%``. A size has a unit: ``KiB``, ``MiB``, ``GiB``, ``TiB``, or the decimal
    ``KB``, ``MB``, ``GB``, ``TB``. Upper and lower case are the same.

    Raises:
        SettingError: the value is neither ``off`` nor a share nor a size.
    """
    if value.strip().lower() == OFF:
        return None
    found = _AMOUNT.fullmatch(value.strip())
    unit = "" if found is None else found[2].lower()
    if found is None or (unit != "%" and unit not in _UNITS):
        raise SettingError(
            f"{EXPERT_CACHE.name}={value!r} is not a valid value; set it to {OFF}, a share of the "
            "experts such as 25%, or a size such as 8GiB or 800MiB."
        )
    amount = Fraction(found[1])
    if unit == "%":
        return CacheSetting(value, share=amount / 100)
    return CacheSetting(value, nbytes=int(amount * _UNITS[unit]))


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The slots of every layer.

    Attributes:
        layers: the layers with experts.
        slots: number of slots of each, in the same order.
        per_token: experts that one token needs in a layer.
        nbytes: bytes of all slots.
        least: bytes of the smallest possible cache.
        full: bytes of all experts.
    """

    layers: tuple[ExpertLayer, ...]
    slots: tuple[int, ...]
    per_token: int
    nbytes: int
    least: int
    full: int

    @property
    def all_resident(self) -> bool:
        """Whether there is a slot for every expert, so that none is ever read again."""
        return all(n == layer.experts for n, layer in zip(self.slots, self.layers, strict=True))

    @property
    def share(self) -> float:
        """The part of all experts' bytes that is kept; 1 without experts."""
        return self.nbytes / self.full if self.full else 1.0

    def misses_per_pass(self, tokens: int) -> int:
        """Return the number of experts, over all layers, that a pass reads at most.

        Args:
            tokens: in the pass. Each may need experts that no other one needs.
        """
        return sum(self._misses(tokens))

    def read_per_pass(self, tokens: int) -> int:
        """Return the bytes of the files that a pass reads at most, once the slots are full.

        Args:
            tokens: in the pass. Each may need experts that no other one needs.
        """
        missing = zip(self._misses(tokens), self.layers, strict=True)
        return sum(count * layer.expert_read for count, layer in missing)

    def _misses(self, tokens: int) -> list[int]:
        wanted = tokens * self.per_token
        each = zip(self.slots, self.layers, strict=True)
        return [min(wanted, layer.experts - slots) for slots, layer in each]


def divide(layers: Sequence[ExpertLayer], per_token: int, setting: CacheSetting) -> CachePlan:
    """Divide the cache over the layers.

    Args:
        layers: the layers with experts.
        per_token: experts that one token needs in a layer.
        setting: the size of the cache.

    Raises:
        InsufficientMemoryError: it is less than the experts of one token take.
    """
    fewest = [min(per_token, layer.experts) for layer in layers]
    least, full = _bytes(layers, fewest), full_bytes(layers)
    budget = setting.budget(full)
    if budget < least:
        share = -(-1000 * least // full) / 10
        raise InsufficientMemoryError(
            f"{EXPERT_CACHE.name}={setting.words} is less than the {per_token} experts that one "
            f"token needs in each of {len(layers)} layers take; set it to at least "
            f"{size_setting(least)}, or {share:g}%."
        )
    more = Fraction(budget - least, full - least) if full > least else Fraction(0)
    slots = [
        few + int(more * (layer.experts - few)) for few, layer in zip(fewest, layers, strict=True)
    ]
    rest = budget - _bytes(layers, slots)
    for index, layer in enumerate(layers):
        if slots[index] < layer.experts and layer.expert_bytes <= rest:
            slots[index] += 1
            rest -= layer.expert_bytes
    return CachePlan(tuple(layers), tuple(slots), per_token, _bytes(layers, slots), least, full)


def least_bytes(layers: Sequence[ExpertLayer], per_token: int) -> int:
    """Return the bytes of the smallest cache: the experts of one token in every layer."""
    return _bytes(layers, [min(per_token, layer.experts) for layer in layers])


def full_bytes(layers: Sequence[ExpertLayer]) -> int:
    """Return the bytes of all experts."""
    return _bytes(layers, [layer.experts for layer in layers])


def _bytes(layers: Sequence[ExpertLayer], slots: Sequence[int]) -> int:
    return sum(n * layer.expert_bytes for n, layer in zip(slots, layers, strict=True))


def size_setting(count: int) -> str:
    """Return the smallest size in whole MiB, or KiB if it is small, that holds so many bytes."""
    unit, width = ("MiB", 20) if count >= 64 << 20 else ("KiB", 10)
    return f"{-(-count >> width) if count else 0}{unit}"
