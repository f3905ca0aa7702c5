"""The operations that a plan is made of.

Each is a frozen dataclass that knows what it does to shapes and dtypes
(``result``) and which operation undoes it (``inverse``); ``execute`` knows how.
Axes: ``E`` experts, ``O`` output rows, ``I`` input columns of a projection,
``o = ceil(O/b0)`` and ``i = ceil(I/b1)`` the grid of its scales.

An operation takes and gives an ``Operand``: weights and, while they are
quantised, their scales (and affine formats' biases), kept side by side so that
stacking moves them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Spec:
    """The dtype (safetensors' name) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """What goes into an operation and comes out of it."""

    weights: tuple[Spec, ...]
    scales: tuple[Spec, ...] = ()
    biases: tuple[Spec, ...] = ()


def scale_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales: ``[…, O, I]`` gives ``[…, o, i]``."""
    *lead, rows, columns = shape
    return (*lead, -(-rows // block[0]), -(-columns // block[1]))


@dataclass(frozen=True, slots=True)
class StackExperts:
    """``E`` tensors ``[O, I]`` become one ``[E, O, I]``; their scales likewise."""

    experts: int

    def result(self, given: Operand, target: str) -> Operand:
        """Stack equal specs on a new first axis; dtypes stay."""
        return Operand(self._stack(given.weights), self._stack(given.scales))

    def _stack(self, specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
        if not specs:
            return ()
        if len(specs) != self.experts or len(set(specs)) != 1:
            raise ValueError(f"{self.experts} equal tensors were expected, not {specs}")
        return (Spec(specs[0].dtype, (self.experts, *specs[0].shape)),)

    def inverse(self) -> UnstackExperts:
        """Return the operation that takes the stack apart."""
        return UnstackExperts(self.experts)


@dataclass(frozen=True, slots=True)
class UnstackExperts:
    """One ``[E, O, I]`` becomes ``E`` tensors ``[O, I]``; its scales likewise."""

    experts: int

    def result(self, given: Operand, target: str) -> Operand:
        """Take the first axis apart; dtypes stay."""
        return Operand(self._unstack(given.weights), self._unstack(given.scales))

    def _unstack(self, specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
        if not specs:
            return ()
        if len(specs) != 1 or specs[0].shape[0] != self.experts:
            raise ValueError(f"a stack of {self.experts} was expected, not {specs}")
        return (Spec(specs[0].dtype, specs[0].shape[1:]),) * self.experts

    def inverse(self) -> StackExperts:
        """Return the operation that stacks them again."""
        return StackExperts(self.experts)


@dataclass(frozen=True, slots=True)
class DequantizeBlockFp8:
    """E4M3 ``[…, O, I]`` times its scales ``[…, o, i]``, in the target dtype.

    Every scale covers ``block`` rows and columns, fewer at the lower and right
    edge. The product is formed in float32 and rounded once.
    """

    block: tuple[int, int]

    def result(self, given: Operand, target: str) -> Operand:
        """Drop the scales; the shape stays, the dtype becomes the target."""
        (weight,), (scale,) = given.weights, given.scales
        if weight.dtype != "F8_E4M3" or scale.shape != scale_grid(weight.shape, self.block):
            raise ValueError(f"{scale} does not scale {weight} in blocks of {self.block}")
        return Operand((Spec(target, weight.shape),))

    def inverse(self) -> QuantizeBlockFp8:
        """Return the operation that quantises again; it rounds, this one did not."""
        return QuantizeBlockFp8(self.block)


@dataclass(frozen=True, slots=True)
class QuantizeBlockFp8:
    """A float ``[…, O, I]`` becomes E4M3 and float32 scales ``[…, o, i]``.

    A block's scale is its largest magnitude over 448, E4M3's largest number; a
    block of zeros gets 1.
    """

    block: tuple[int, int]

    def result(self, given: Operand, target: str) -> Operand:
        """Add float32 scales; the shape stays, the dtype becomes E4M3."""
        (weight,) = given.weights
        scales = Spec("F32", scale_grid(weight.shape, self.block))
        return Operand((Spec("F8_E4M3", weight.shape),), (scales,))

    def inverse(self) -> DequantizeBlockFp8:
        """Return the operation that multiplies the scales back."""
        return DequantizeBlockFp8(self.block)


@dataclass(frozen=True, slots=True)
class SplitGateUp:
    """Combined experts ``[E, 2I, H]`` become gate ``[E, I, H]`` and up ``[E, I, H]``."""

    def result(self, given: Operand, target: str) -> Operand:
        """Halve the rows; the dtype stays."""
        (weight,) = given.weights
        *lead, rows, columns = weight.shape
        if rows % 2 or given.scales:
            raise ValueError(f"{given} is no combined gate and up")
        return Operand((Spec(weight.dtype, (*lead, rows // 2, columns)),) * 2)

    def inverse(self) -> JoinGateUp:
        """Return the operation that puts the halves together."""
        return JoinGateUp()


@dataclass(frozen=True, slots=True)
class JoinGateUp:
    """Gate and up, ``[E, I, H]`` each, become one ``[E, 2I, H]``: gate's rows first."""

    def result(self, given: Operand, target: str) -> Operand:
        """Double the rows; the dtype stays."""
        gate, up = given.weights
        if gate != up or given.scales:
            raise ValueError(f"{given} is no gate and up")
        *lead, rows, columns = gate.shape
        return Operand((Spec(gate.dtype, (*lead, 2 * rows, columns)),))

    def inverse(self) -> SplitGateUp:
        """Return the operation that takes the halves apart."""
        return SplitGateUp()


@dataclass(frozen=True, slots=True)
class Requantize:
    """A float ``[…, O, I]`` becomes MLX's packed form, group by group along ``I``.

    ``uint32 […, O, I·bits/32]`` and scales ``[…, O, I/group]``: in the weight's own
    dtype, with biases like them, where the mode is ``affine``; else one E8M0 byte.
    The formats are those of ``mlx.core.quantize``, and so are the values.
    """

    bits: int
    group: int
    mode: str = "affine"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of this shape are whole groups."""
        return len(shape) > 1 and shape[-1] % self.group == 0

    def result(self, given: Operand, target: str) -> Operand:
        """Pack every weight; scales and biases are added."""
        if given.scales or not all(self.fits(spec.shape) for spec in given.weights):
            raise ValueError(f"{given} is not made of whole groups of {self.group}")
        affine = self.mode == "affine"
        scales = tuple(
            Spec(w.dtype if affine else "U8", (*w.shape[:-1], w.shape[-1] // self.group))
            for w in given.weights
        )
        packed = tuple(
            Spec("U32", (*w.shape[:-1], w.shape[-1] * self.bits // 32)) for w in given.weights
        )
        return Operand(packed, scales, scales if affine else ())

    def inverse(self) -> Unpack:
        """Return the operation that gives floats again; this one rounds, it does not."""
        return Unpack(self.bits, self.group, self.mode)

    @property
    def config(self) -> dict[str, int | str]:
        """What mlx-lm's ``config["quantization"]`` says of such a weight."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}-bit g{self.group}" if self.mode == "affine" else self.mode


@dataclass(frozen=True, slots=True)
class Unpack:
    """MLX's packed form becomes floats ``[…, O, I]`` in the target dtype."""

    bits: int
    group: int
    mode: str = "affine"

    def result(self, given: Operand, target: str) -> Operand:
        """Drop scales and biases; the last axis is the weights' again."""
        return Operand(
            tuple(
                Spec(target, (*w.shape[:-1], w.shape[-1] * 32 // self.bits)) for w in given.weights
            )
        )

    def inverse(self) -> Requantize:
        """Return the operation that packs again."""
        return Requantize(self.bits, self.group, self.mode)


QUANTIZE_SETTINGS = {
    "8bit": Requantize(8, 64),
    "mxfp8": Requantize(8, 32, "mxfp8"),
    "6bit": Requantize(6, 64),
    "4bit": Requantize(4, 64),
}
"""What ``VLLM_MOE_COMPAT_QUANTIZE`` may name, besides ``none``; the largest first."""

Op: TypeAlias = (
    StackExperts
    | UnstackExperts
    | DequantizeBlockFp8
    | QuantizeBlockFp8
    | SplitGateUp
    | JoinGateUp
    | Requantize
    | Unpack
)
