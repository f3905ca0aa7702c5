"""Find weights stored as integers with scales and zero points; shared by the integer forms.

A form names its weights and their parts (``candidates``) and turns their shapes and the
module's settings into an operation (``operation``). Weights that agree in all of these share one
operation, as a checkpoint has tens of thousands. Whatever contradicts itself is a finding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from vllm_moe_compat.checkpoint.findings import CONVERT, Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers.form import (
    Details,
    FoundNumbers,
    NumberForm,
    StoredWeight,
)
from vllm_moe_compat.checkpoint.numbers.int_settings import (
    IntConfig,
    IntSettings,
    read_int_config,
)
from vllm_moe_compat.checkpoint.numbers.ints_op import SHAPE, DequantizeInts
from vllm_moe_compat.errors import CompatError, LayoutError, UnsupportedCheckpointError

Parts: TypeAlias = Mapping[str, TensorInfo]
"""Role → tensor; ``weight`` is the tensor with the integers."""


class Candidate(NamedTuple):
    """A weight with its tensors, not yet examined."""

    weight: str
    stored: StoredWeight


@dataclass(eq=False)
class Contradiction(Exception):  # noqa: N818 - it becomes a finding
    """A fault of one weight: the role of the tensor, what it is and what was expected."""

    role: str
    found: str
    expected: str
    error: type[CompatError] = LayoutError


@dataclass(slots=True)
class IntTensors(FoundNumbers):
    """The weights of one integer form in a checkpoint.

    Attributes:
        form: the form.
        tensors: all tensors, for shapes and dtypes.
        weights: weight → its tensors.
        ops: weight → its operation; faulty weights have none.
        faults: the faults of weights.
        unused: always empty.
    """

    form: NumberForm
    tensors: Mapping[str, TensorInfo]
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    ops: dict[str, DequantizeInts] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.weights)

    def logical(self, weight: str) -> TensorInfo:
        """Describe a weight by the shape of its floats."""
        info, op = self.tensors[self.weights[weight].tensor], self.ops.get(weight)
        return info if op is None else replace(info, shape=op.logical(info.shape))

    def dequantize(self, weight: str) -> DequantizeInts:
        """Return the operation that dequantises a weight."""
        return self.ops[weight]

    def findings(self) -> Iterator[Finding]:
        """Yield the contradictions of parts, shapes and config."""
        yield from self.faults

    def contents(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the ``weight_shape`` of each weight, and the shape of its floats."""
        for weight in self.ops:
            name = dict(self.weights[weight].parts).get(SHAPE)
            if name is not None and len(self.tensors[name].shape) == 1:
                size = self.tensors[name].shape[0]
                yield name, self.logical(weight).shape[-size:]

    def kinds(self) -> Collection[frozenset[str]]:
        """Return the form's name: no module reads some of its variants only."""
        return [frozenset({self.form.name})]

    def stray(self) -> Collection[str]:
        """Return nothing: weights without a part are findings."""
        return ()

    @property
    def details(self) -> Details:
        """The widths and groups that occur."""
        ops = set(self.ops.values())
        names = sorted({op.name for op in ops}) or [self.form.title]
        blocks = sorted({(1, min(op.group, op.columns)) for op in ops})
        scales = tuple(sorted({op.scales for op in ops}))
        return Details(
            " and ".join(names), len(self.weights), tuple(blocks[:8]), scales, len(self.unused)
        )


class IntForm(NumberForm):
    """A form of integers with scales and zero points."""

    faults: Mapping[str, str] = MappingProxyType(
        {
            "scales": "packed integers whose parts are missing, or contradict them or the config",
            "unsupported": "packed integers of a variant that this package does not read",
        }
    )

    @abstractmethod
    def candidates(
        self, tensors: Mapping[str, TensorInfo], config: IntConfig
    ) -> Iterator[Candidate]:
        """Yield the form's weights."""

    @abstractmethod
    def operation(
        self, parts: Parts, settings: IntSettings | None, config: IntConfig
    ) -> DequantizeInts:
        """Return the operation for a weight of these parts.

        Raises:
            Contradiction: the parts contradict each other or the settings.
        """

    def find(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> IntTensors:
        """Find the form's weights and examine their parts."""
        found = IntTensors(self, tensors)
        read: IntConfig | None = None
        known: dict[Any, DequantizeInts | Contradiction] = {}
        for weight, stored in self.candidates(tensors, read_int_config(config)):
            read = read or read_int_config(config)
            found.weights[weight] = stored
            settings = read.of(weight.removesuffix(".weight"))
            info = tensors[stored.tensor]
            key = (
                settings,
                info.dtype,
                info.shape,
                *((role, tensors[n].dtype, tensors[n].shape) for role, n in stored.parts),
            )
            op = known.get(key)
            if op is None:
                op = known[key] = self._examine(stored, tensors, settings, read)
            if weight in tensors and weight != stored.tensor:
                op = Contradiction("weight", f"repeats the weight {weight}", "one of them")
            if isinstance(op, Contradiction):
                found.faults.append(self._finding(op, stored))
            else:
                found.ops[weight] = op
        return found

    def _examine(
        self,
        stored: StoredWeight,
        tensors: Mapping[str, TensorInfo],
        settings: IntSettings | None,
        config: IntConfig,
    ) -> DequantizeInts | Contradiction:
        parts = {role: tensors[name] for role, name in stored.parts}
        try:
            if config.method not in self.methods:
                named = f"quant_method {config.method!r}" if config.method else "no quant_method"
                methods = " or ".join(sorted(self.methods))
                raise Contradiction(
                    "weight",
                    f"is {self.title}, and config.json has {named}",
                    f"quant_method {methods}",
                )
            if config.unknown:
                raise Contradiction(
                    "weight",
                    f"is {self.title} with {config.unknown} in config.json",
                    "a known packing",
                    UnsupportedCheckpointError,
                )
            shape = tensors[stored.tensor].shape
            if len(shape) < 2 or 0 in shape:
                raise Contradiction("weight", f"has the shape {list(shape)}", "rows and columns")
            return self.operation({"weight": tensors[stored.tensor], **parts}, settings, config)
        except Contradiction as fault:
            return fault.with_traceback(None)

    def _finding(self, fault: Contradiction, stored: StoredWeight) -> Finding:
        name = dict(stored.parts).get(fault.role, stored.tensor)
        missing = fault.found.startswith("has no")
        finding = Finding(name, fault.found, fault.expected, error=fault.error, topic=self.name)
        if fault.error is UnsupportedCheckpointError:
            finding = replace(finding, remedy=CONVERT)
        return replace(finding, rank=1) if missing else finding

    def infer(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return the tensors: MLX has the dtypes of integers."""
        return dict(tensors)


def float_name(weight: str, tensors: Mapping[str, TensorInfo], ending: str) -> str:
    """Return a weight's name in a float checkpoint, where combined experts have no ``.weight``.

    Args:
        weight: ``….weight``, or a name without it.
        tensors: all tensors.
        ending: turns ``weight`` without ``weight`` into the name of the stored tensor.
    """
    stem = weight.removesuffix(".weight")
    place, _, projection = stem.rpartition(".")
    if stem == weight or not place.endswith(".experts"):
        return weight
    if projection not in ("gate_up_proj", "up_proj", "down_proj"):
        return weight
    # Without a gate, up and down are combined experts too; beside one they are stacked.
    stacked = f"{place}.gate_proj.{ending}" in tensors
    joined = projection == "up_proj" and f"{place}.gate_up_proj.{ending}" in tensors
    return weight if stacked or joined else stem


def expect(parts: Parts, role: str, shape: tuple[int, ...], dtypes: Collection[str]) -> None:
    """Check shape and dtype of a part.

    Raises:
        Contradiction: one of them is another.
    """
    info = parts[role]
    if info.shape != shape or info.dtype not in dtypes:
        kind = " or ".join(sorted(dtypes))
        raise Contradiction(role, f"is {info.dtype} {list(info.shape)}", f"{kind} {list(shape)}")
