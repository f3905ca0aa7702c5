"""The questions that every stored number form answers.

A checkpoint stores a weight's numbers as floats, or in a *form*: bytes with scales, packed
integers with scales and zero points, … A form says which tensors make one weight, what
can be wrong with them, what the form is called, and which operation turns it into floats.
The planner, the estimate, the guard, ``inspect`` and ``convert`` ask these questions and
know no form by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_moe_compat.checkpoint.findings import Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.operations import Dequantize, Op


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight in a stored number form.

    Attributes:
        tensor: the tensor that holds its numbers.
        parts: role → the further tensor that the form needs; ``{"scale": …}``.
    """

    tensor: str
    parts: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the weight."""
        return (self.tensor, *(name for _, name in self.parts))


@dataclass(frozen=True, slots=True)
class Details:
    """What a report says of a form, besides its name.

    Attributes:
        words: the form: ``block FP8``.
        weights: how many weights are stored in it.
        blocks: rows and columns that share one scale, as they occur.
        scale_dtypes: safetensors' names of the scales' dtypes.
        unused: tensors of the form that MLX has no use for.
    """

    words: str
    weights: int
    blocks: tuple[tuple[int, int], ...] = ()
    scale_dtypes: tuple[str, ...] = ()
    unused: int = 0


class FoundNumbers(ABC):
    """The tensors of one form in one checkpoint.

    Attributes:
        form: which.
        weights: name of the weight, as a float checkpoint would have it → its tensors.
        unused: tensors that belong to the form and that MLX has no use for, such as
            scales of activations and of KV caches.
    """

    form: NumberForm
    weights: Mapping[str, StoredWeight]
    unused: Collection[str]

    @abstractmethod
    def __bool__(self) -> bool:
        """Whether the checkpoint has anything of the form, faulty tensors included."""

    @abstractmethod
    def logical(self, weight: str) -> TensorInfo:
        """Describe a weight: the form's dtype, and the shape that its floats have."""

    @abstractmethod
    def dequantize(self, weight: str) -> Dequantize:
        """Return the operation that turns a weight into floats; ``findings`` is empty."""

    @abstractmethod
    def findings(self) -> Iterator[Finding]:
        """Yield everything that is wrong with the form's tensors."""

    @abstractmethod
    def kinds(self) -> Collection[frozenset[str]]:
        """Return the kinds that each group of like weights is of.

        ``Row.digests`` and ``Row.keeps`` name them: ``fp8 block 128``.
        """

    @abstractmethod
    def stray(self) -> Collection[str]:
        """Return weights of the form that cannot be read, for want of a part."""

    @property
    @abstractmethod
    def details(self) -> Details:
        """What a report says of it."""


class NumberForm(ABC):
    """One stored number form.

    Attributes:
        name: in ids of findings.
        title: in messages.
        faults: kind of finding, ``scales`` or ``unsupported`` → what it means.
        methods: values of ``quant_method`` in configs of checkpoints in the form.
        dtypes: safetensors' names of the dtypes that only weights in the form have.
    """

    name: str
    title: str
    faults: Mapping[str, str]
    methods: frozenset[str]
    dtypes: frozenset[str]

    @abstractmethod
    def find(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> FoundNumbers:
        """Find the form's tensors.

        Raises:
            LayoutError: the config describes the form with an invalid value.
        """

    @abstractmethod
    def infer(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Rename dtypes that MLX's loader does not tell apart, for dicts without headers."""


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """How weights are written in a form.

    Attributes:
        parts: role → names, one for each weight.
        ops: the operations that read them back as floats.
    """

    parts: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())
    ops: tuple[Op, ...] = ()


class WrittenNumbers(ABC):
    """A form with all of its settings, in which weights are to be written."""

    @abstractmethod
    def write(self, shape: tuple[int, ...], *weights: str) -> WrittenWeights:
        """Say how weights of ``shape`` ``[…, O, I]`` are written."""

    @abstractmethod
    def quantization_config(self, kept: Collection[str]) -> dict[str, Any]:
        """Return the ``quantization_config`` of such a checkpoint.

        Args:
            kept: modules whose weights are not in the form.
        """

    @property
    @abstractmethod
    def words(self) -> str:
        """The form with its settings: ``FP8 128x128``."""
