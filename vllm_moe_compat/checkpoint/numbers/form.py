"""The interface of stored number forms.

A checkpoint stores a weight's numbers as floats or in a *form*: bytes with scales, packed
integers with scales and zero points, … A form defines the tensors of one weight, their
possible faults, the names for messages, and the operation that dequantises them. The planner,
the estimate, the guard, ``inspect`` and ``convert`` use this interface and name no form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_moe_compat.checkpoint.findings import Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.operations import Dequantize, Op


class StoredWeight(NamedTuple):
    """One weight in a stored number form; a tuple, since a checkpoint has tens of thousands.

    Attributes:
        tensor: the tensor with the stored numbers.
        parts: pairs of role and further tensor: ``(("scale", "….weight_scale_inv"),)``.
    """

    tensor: str
    parts: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the weight."""
        return (self.tensor, *(name for _, name in self.parts))


@dataclass(frozen=True, slots=True)
class Details:
    """Details of a form in one checkpoint, for reports.

    Attributes:
        words: the form in a message: ``block FP8``.
        weights: number of weights in the form.
        blocks: rows and columns that share one scale; each size that occurs.
        scale_dtypes: safetensors' names of the scales' dtypes.
        unused: number of the form's tensors that MLX does not use.
    """

    words: str
    weights: int
    blocks: tuple[tuple[int, int], ...] = ()
    scale_dtypes: tuple[str, ...] = ()
    unused: int = 0


class FoundNumbers(ABC):
    """The tensors of one form in one checkpoint.

    Attributes:
        form: the form.
        weights: name of the weight in a float checkpoint → its tensors.
        unused: tensors of the form that MLX does not use.
    """

    form: NumberForm
    weights: Mapping[str, StoredWeight]
    unused: Collection[str]

    @abstractmethod
    def __bool__(self) -> bool:
        """Whether the checkpoint has tensors of the form, faulty ones included."""

    @abstractmethod
    def logical(self, weight: str) -> TensorInfo:
        """Describe a weight: the stored dtype, and the shape of its floats."""

    @abstractmethod
    def dequantize(self, weight: str) -> Dequantize:
        """Return the operation that dequantises a weight; ``findings`` must be empty."""

    @abstractmethod
    def findings(self) -> Iterator[Finding]:
        """Yield the faults of the form's tensors."""

    def contents(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield small tensors that repeat what headers say, and the numbers in them."""
        return iter(())

    @abstractmethod
    def kinds(self) -> Collection[frozenset[str]]:
        """Return the kinds of each group of similar weights.

        ``Row.digests`` and ``Row.keeps`` list kinds: ``fp8 block 128``.
        """

    @abstractmethod
    def stray(self) -> Collection[str]:
        """Return weights of the form that cannot be read because a part is missing."""

    @property
    @abstractmethod
    def details(self) -> Details:
        """Details for reports."""


class NumberForm(ABC):
    """One stored number form.

    Attributes:
        name: in ids of findings.
        title: in messages.
        faults: kind of finding, ``scales`` or ``unsupported`` → what it means.
        methods: values of ``quant_method`` in configs of checkpoints in the form.
        dtypes: safetensors' names of the dtypes of weights in the form alone.
        misread_upstream: what mlx-lm's ``load_model`` does wrong with linear layers of the form,
            where it reads the form at all; experts it does not read.
        zero_biases: whether packers of the form write biases of zeros for layers without a bias.
    """

    name: str
    title: str
    faults: Mapping[str, str]
    methods: frozenset[str]
    dtypes: frozenset[str]
    misread_upstream: str = ""
    zero_biases: bool = False

    @abstractmethod
    def find(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> FoundNumbers:
        """Find the form's tensors.

        Raises:
            LayoutError: the config describes the form with an invalid value.
        """

    @abstractmethod
    def infer(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Correct dtypes that MLX's loader reports as ``U8``, for tensors without headers."""


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """The tensors and operations of weights that are written in a form.

    Attributes:
        parts: pairs of role and names, one name for each weight.
        ops: the operations that read the written weights as floats.
    """

    parts: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())
    ops: tuple[Op, ...] = ()


class WrittenNumbers(ABC):
    """A form with all of its settings, for writing weights."""

    @abstractmethod
    def write(self, shape: tuple[int, ...], *weights: str) -> WrittenWeights:
        """Return parts and operations for weights of ``shape`` ``[…, O, I]``."""

    @abstractmethod
    def quantization_config(self, kept: Collection[str]) -> dict[str, Any]:
        """Return the ``quantization_config`` of such a checkpoint.

        Args:
            kept: modules that stay floats.
        """

    @property
    @abstractmethod
    def words(self) -> str:
        """The form with its settings in a message: ``FP8 128x128``."""
