"""Stored number forms: one file per form, and the list of them.

A further form is a module here with a ``NumberForm``, an entry in ``FORMS``, and the
execution of its operations in ``execute/numbers``. Nothing else names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.checkpoint.findings import Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers import fp8
from vllm_moe_compat.checkpoint.numbers.form import Details, FoundNumbers, NumberForm, StoredWeight
from vllm_moe_compat.checkpoint.operations import Dequantize

FORMS: list[NumberForm] = [fp8.FORM]


@dataclass(frozen=True, slots=True)
class Numbers:
    """How a checkpoint stores its numbers, where they are not floats.

    Attributes:
        found: the forms that occur.
        weights: name of each weight that is stored in one of them → its form's tensors.
    """

    found: tuple[FoundNumbers, ...]
    weights: Mapping[str, FoundNumbers]

    def stored(self, weight: str) -> StoredWeight:
        """Return the tensors of a weight; a float weight is its own."""
        form = self.weights.get(weight)
        return StoredWeight(weight, ()) if form is None else form.weights[weight]

    def dequantize(self, weight: str) -> Dequantize | None:
        """Return the operation that makes floats of a weight; None where it is floats."""
        form = self.weights.get(weight)
        return None if form is None else form.dequantize(weight)

    def isdisjoint(self, names: Iterable[str]) -> bool:
        """Whether none of the names is a weight in one of the forms, readable or not."""
        stray = set(self.stray)
        return not any(name in self.weights or name in stray for name in names)

    @property
    def parts(self) -> frozenset[str]:
        """Names of all tensors that only belong to a weight or to nothing: scales and such."""
        return frozenset(
            name
            for found in self.found
            for name in (
                *found.unused,
                *(part for stored in found.weights.values() for _, part in stored.parts),
            )
        )

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the tensors that MLX has no use for."""
        return tuple(name for found in self.found for name in found.unused)

    @property
    def stray(self) -> tuple[str, ...]:
        """Names of the weights that cannot be read, for want of a part."""
        return tuple(name for found in self.found for name in found.stray())

    @property
    def details(self) -> list[Details]:
        """What a report says of each form."""
        return [found.details for found in self.found]

    @property
    def methods(self) -> frozenset[str]:
        """Values of ``quant_method`` that the forms here are published under."""
        return frozenset(method for found in self.found for method in found.form.methods)

    def findings(self) -> Iterator[Finding]:
        """Yield everything that is wrong with them."""
        for found in self.found:
            yield from found.findings()


def find_numbers(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Numbers:
    """Find every stored number form among the tensors.

    Raises:
        LayoutError: the config describes a form with an invalid value.
    """
    each = [form.find(tensors, config) for form in FORMS]
    found = tuple(numbers for numbers in each if numbers or numbers.unused)
    return Numbers(found, {name: numbers for numbers in found for name in numbers.weights})


def infer_dtypes(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Rename the dtypes that MLX's loader does not tell apart, by the tensors beside them."""
    inferred = dict(tensors)
    for form in FORMS:
        inferred = form.infer(inferred)
    return inferred
