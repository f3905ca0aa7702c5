"""Stored number forms: one file per form, and the list of them.

A new form needs a module here with a ``NumberForm``, an entry in ``FORMS``, and an executor of
its operations in ``execute/numbers``. No other code names a form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.checkpoint.findings import Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers import (
    awq,
    fp8,
    gptq,
    int_quantized,
    mxfp4,
    nvfp4,
    pack_quantized,
)
from vllm_moe_compat.checkpoint.numbers.form import Details, FoundNumbers, NumberForm, StoredWeight
from vllm_moe_compat.checkpoint.operations import Dequantize
from vllm_moe_compat.checkpoint.unused_scales import unused_scales

FORMS: list[NumberForm] = [
    fp8.FORM,
    pack_quantized.FORM,
    int_quantized.FORM,
    gptq.FORM,
    awq.FORM,
    nvfp4.FORM,
    mxfp4.FORM,
]


@dataclass(frozen=True, slots=True)
class Numbers:
    """The stored number forms of one checkpoint.

    Attributes:
        found: the forms that occur.
        weights: name of each weight in such a form → the tensors of that form.
        unused_scales: scales and zero points of activations and caches, in whatever form the
            weights are.
    """

    found: tuple[FoundNumbers, ...]
    weights: Mapping[str, FoundNumbers]
    unused_scales: tuple[str, ...] = ()

    def stored(self, weight: str) -> StoredWeight:
        """Return the tensors of a weight; a float weight is a single tensor."""
        form = self.weights.get(weight)
        return StoredWeight(weight, ()) if form is None else form.weights[weight]

    def dequantize(self, weight: str) -> Dequantize | None:
        """Return the operation that dequantises a weight; None for floats."""
        form = self.weights.get(weight)
        return None if form is None else form.dequantize(weight)

    def isdisjoint(self, names: Iterable[str]) -> bool:
        """Whether no name is a weight in a stored number form, readable or not."""
        stray = set(self.stray)
        return not any(name in self.weights or name in stray for name in names)

    @property
    def parts(self) -> frozenset[str]:
        """Names of all tensors of the forms that are not weights, such as scales."""
        names = set(self.unused)
        for found in self.found:
            names.update([name for _, parts in found.weights.values() for _, name in parts])
        return frozenset(names)

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors of the forms."""
        return self.parts.union(
            stored.tensor for found in self.found for stored in found.weights.values()
        )

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of tensors that MLX does not use."""
        of_forms = (name for found in self.found for name in found.unused)
        return (*self.unused_scales, *of_forms)

    @property
    def stray(self) -> tuple[str, ...]:
        """Names of weights that cannot be read because a part is missing."""
        return tuple(name for found in self.found for name in found.stray())

    @property
    def details(self) -> list[Details]:
        """Details of each form, for reports."""
        return [found.details for found in self.found]

    @property
    def methods(self) -> frozenset[str]:
        """Values of ``quant_method`` of published checkpoints in these forms."""
        return frozenset(method for found in self.found for method in found.form.methods)

    def findings(self) -> Iterator[Finding]:
        """Yield the faults of all forms."""
        for found in self.found:
            yield from found.findings()


def find_numbers(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Numbers:
    """Find every stored number form among the tensors.

    Raises:
        LayoutError: the config describes a form with an invalid value.
    """
    unused = unused_scales(tensors)
    if aside := set(unused):
        tensors = {name: info for name, info in tensors.items() if name not in aside}
    each = [form.find(tensors, config) for form in FORMS]
    found = tuple(numbers for numbers in each if numbers or numbers.unused)
    weights = {name: numbers for numbers in found for name in numbers.weights}
    return Numbers(found, weights, unused)


def infer_dtypes(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Correct dtypes that MLX's loader reports as ``U8``, judged by neighbouring tensors."""
    inferred = dict(tensors)
    for form in FORMS:
        inferred = form.infer(inferred)
    return inferred
