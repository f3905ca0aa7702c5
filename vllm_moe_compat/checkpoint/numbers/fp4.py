"""FP4: pairs of E2M1 values in bytes, with a scale for each group of columns.

Two forms share this layout and differ in their scales: ``nvfp4`` and ``mxfp4``. A form finds its
weights by the dtype of the scale beside a tensor of bytes; this file has the rest.

compressed-tensors names the bytes ``weight_packed``; ModelOpt, Quark and DeepSeek's newest call
them ``weight``. Of combined experts the names are ``gate_up_proj`` and
``gate_up_proj_weight_scale``, and ModelOpt stores those of Llama 4 and gpt-oss turned. A byte
is ``U8``, in DeepSeek's ``I8``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from vllm_moe_compat.checkpoint.findings import CONVERT, Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers.form import Details, FoundNumbers, NumberForm, StoredWeight
from vllm_moe_compat.checkpoint.numbers.fp4_ops import (
    GLOBAL,
    GROUPS,
    SCALE,
    DequantizeFp4,
    matrices,
    unpacked,
)
from vllm_moe_compat.dtypes import FLOATS
from vllm_moe_compat.errors import UnsupportedCheckpointError

Shape: TypeAlias = tuple[int, ...]
Alike: TypeAlias = tuple[TensorInfo, TensorInfo, TensorInfo | None, bool]
"""Bytes, scale and global scale without their files, and whether the last divides."""

BYTES = ("U8", "I8")
PACKED = "_packed"
DIVISOR, FACTOR = "_global_scale", "_scale_2"
"""Endings of global scales: compressed-tensors' divides, ModelOpt's multiplies."""
_NOT_WEIGHTS = ("_scale", "_shape", ".scale", ".scales", "_scales", "_blocks")


def scale_names(name: str) -> Iterator[str]:
    """Yield the names that the scale of a tensor of bytes may have."""
    weight = name.removesuffix(PACKED)
    yield f"{weight}_scale"
    if weight.endswith(".weight"):
        yield f"{weight.removesuffix('weight')}scale"
    else:
        yield f"{weight}_weight_scale"


@dataclass(slots=True)
class Fp4Tensors(FoundNumbers):
    """The tensors of one FP4 form in a checkpoint.

    Attributes:
        form: NVFP4 or MXFP4.
        tensors: all tensors, for shapes and dtypes.
        weights: weight → its bytes, its scale and its global scale.
        bare: bytes that only this form can be, without a scale.
        odd: bytes that only this form can be, with a scale of a wrong dtype → the scale.
        lone: bytes and scale without the global scale that the form has.
        orphans: global scales without a weight.
        unused: always empty.
        alike: dtypes and shapes → the weights that share them.
    """

    form: NumberForm
    tensors: Mapping[str, TensorInfo]
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)
    odd: dict[str, str] = field(default_factory=dict)
    lone: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    alike: dict[Alike, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.weights or self.bare or self.odd or self.orphans)

    @property
    def mode(self) -> str:
        """``nvfp4`` or ``mxfp4``."""
        return self.form.name

    def add(self, weight: str, tensor: str, scale: str, shared: str, *, divides: bool) -> None:
        """Add a weight; ``shared`` is empty without a global scale."""
        parts = [(SCALE, scale), *([(GLOBAL, shared)] if shared else [])]
        self.weights[weight] = StoredWeight(tensor, tuple(parts))
        bare = [_bare(self.tensors[name]) for name in (tensor, scale)]
        third = _bare(self.tensors[shared]) if shared else None
        self.alike.setdefault((*bare, third, divides), []).append(weight)  # type: ignore[arg-type]

    def logical(self, weight: str) -> TensorInfo:
        """Describe a weight: two columns per byte."""
        tensor, parts = self.weights[weight]
        info = self.tensors[tensor]
        turned = _is_turned(info, self.tensors[dict(parts)[SCALE]])
        return TensorInfo("F4", unpacked(info.shape, turned=turned), info.file)

    def dequantize(self, weight: str) -> DequantizeFp4:
        """Return the operation that multiplies a weight by its scales."""
        tensor, given = self.weights[weight]
        parts = dict(given)
        shared = parts.get(GLOBAL, "")
        turned = _is_turned(self.tensors[tensor], self.tensors[parts[SCALE]])
        return DequantizeFp4(self.mode, bool(shared), shared.endswith(DIVISOR), turned)

    def stray(self) -> Collection[str]:
        """Return bytes without a scale that can be read."""
        return [*self.bare, *self.odd]

    def findings(self) -> Iterator[Finding]:
        """Yield weights whose scales are missing or do not fit, and scales without a weight."""
        title = self.form.title
        for name in self.bare:
            expected = next(scale_names(name)).rpartition(".")[2]
            yield self._fault(name, f"is {title} without a scale", f"{expected} beside it", rank=1)
        for scale in self.odd.values():
            found = f"holds {self.tensors[scale].dtype} scales of packed bytes"
            yield Finding(
                scale,
                found,
                "E4M3 scales, as of NVFP4, or E8M0 scales, as of MXFP4",
                remedy=CONVERT,
                error=UnsupportedCheckpointError,
                rank=1,
                topic=self.form.name,
            )
        for name in self.lone:
            found = f"is {title} without a global scale"
            expected = "weight_global_scale or weight_scale_2 beside it"
            yield self._fault(name, found, expected, rank=1)
        for name in self.orphans:
            found, expected = "scales a weight that is missing", "that weight beside it"
            yield self._fault(name, found, expected, rank=1)
        for (weight, scale_info, shared, _), names in self.alike.items():
            for name in names:
                tensor, parts = self.weights[name]
                yield from self._pair(weight, scale_info, shared, (tensor, *(n for _, n in parts)))

    def _pair(
        self,
        weight: TensorInfo,
        scale: TensorInfo,
        shared: TensorInfo | None,
        names: tuple[str, ...],
    ) -> Iterator[Finding]:
        group = GROUPS[self.mode]
        title = self.form.title
        shape = list(weight.shape)
        turned = _is_turned(weight, scale)
        if turned:
            shape[-2:] = shape[:-3:-1]
        if len(shape) < 2 or 2 * shape[-1] % group:
            found = f"is {title} of shape {shape}, {2 * shape[-1] if shape else 0} columns in pairs"
            yield self._fault(names[0], found, f"rows of whole groups of {group} columns")
            return
        grid = [*shape[:-1], 2 * shape[-1] // group]
        if not turned and list(scale.shape) != grid:
            found = f"has the shape {list(scale.shape)} for {title} bytes of {shape}"
            yield self._fault(names[1], found, f"{grid}, one scale per {group} columns")
        if shared is None:
            return
        count, sizes = matrices(weight.shape), {1}
        if len(shape) > 2:
            # Combined experts may have one each for gate and up.
            sizes |= {count, 2 * count} if "gate_up" in names[0] else {count}
        size = 1
        for axis in shared.shape:
            size *= axis
        if shared.dtype not in FLOATS or size not in sizes:
            found = f"is {shared.dtype} of shape {list(shared.shape)} for {title} bytes of {shape}"
            yield self._fault(names[2], found, "one float for a matrix")

    def _fault(self, name: str, found: str, expected: str, rank: int = 2) -> Finding:
        return Finding(name, found, expected, rank=rank, topic=self.form.name)

    def kinds(self) -> list[frozenset[str]]:
        """Return the form's name for each group of similar weights."""
        return [frozenset({self.form.name}) for _ in self.alike]

    @property
    def details(self) -> Details:
        """The number of weights, the groups and the scales' dtypes."""
        dtypes = {scale.dtype for _, scale, _, _ in self.alike}
        count = len(self.weights) + len(self.stray())
        blocks = ((1, GROUPS[self.mode]),)
        return Details(self.form.title, count, blocks, tuple(sorted(dtypes)))


def _is_turned(weight: TensorInfo, scale: TensorInfo) -> bool:
    """Whether experts are stored ``[E, I/2, O]`` with scales ``[E, I/g, O]``, as ModelOpt does.

    The float experts of Llama 4 and gpt-oss are ``[E, I, O]``.
    """
    if len(weight.shape) != 3 or len(scale.shape) != 3:
        return False
    (count, half, rows), (_, groups, _) = weight.shape, scale.shape
    whole = scale.shape == (count, groups, rows) and groups > 0 and 2 * half % groups == 0
    return whole and 2 * half // groups in GROUPS.values()


def _bare(info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.dtype, info.shape)


class Fp4(NumberForm):
    """One FP4 form.

    Attributes:
        scales: safetensors' names of the dtypes of scales.
    """

    scales: frozenset[str]
    dtypes: frozenset[str] = frozenset()

    def find(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Fp4Tensors:
        """Pair every tensor of bytes with its scales."""
        found = Fp4Tensors(self, tensors)
        for name, info in tensors.items():
            if info.dtype not in BYTES or name.endswith(_NOT_WEIGHTS):
                continue
            scale = next((s for s in scale_names(name) if s in tensors), "")
            if scale and tensors[scale].dtype in self.scales:
                weight = name.removesuffix(PACKED)
                shared = self.shared_of(weight, tensors)
                found.add(weight, name, scale, shared, divides=shared.endswith(DIVISOR))
        return found

    def shared_of(self, weight: str, tensors: Mapping[str, TensorInfo]) -> str:
        """Return the name of a weight's global scale; empty if the form has none."""
        return ""

    def infer(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Change nothing."""
        return dict(tensors)
