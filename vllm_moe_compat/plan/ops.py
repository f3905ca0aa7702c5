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

import math
from dataclasses import dataclass
from typing import TypeAlias

from vllm_moe_compat.plan.packing import Requantize, Unpack
from vllm_moe_compat.plan.specs import Operand, Spec


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
        # Mostly one and the same object: that is seen without comparing what it holds.
        if len(specs) != self.experts or specs.count(specs[0]) != len(specs):
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
class DequantizeFp8:
    """E4M3 ``[…, O, I]`` times its scales, in the target dtype.

    Every scale covers ``block`` rows and columns, fewer at the lower and right edge:
    ``(128, 128)``, ``(1, I)`` for one per row, ``(O, I)`` for one per tensor. Scales
    come as ``[…, o, i]``, or in any shape that has as many, or as one for all.
    The product is formed in float32 and rounded once.

    Attributes:
        block: rows and columns.
        e8m0: whether scales are exponent bytes ``b``, worth ``2 ** (b - 127)``.
    """

    block: tuple[int, int]
    e8m0: bool = False

    def result(self, given: Operand, target: str) -> Operand:
        """Drop the scales; the shape stays, the dtype becomes the target."""
        (weight,), (scale,) = given.weights, given.scales
        count, grid = math.prod(scale.shape), math.prod(scale_grid(weight.shape, self.block))
        if weight.dtype != "F8_E4M3" or count not in (1, grid):
            raise ValueError(f"{scale} does not scale {weight} in blocks of {self.block}")
        return Operand((Spec(target, weight.shape),))

    def inverse(self) -> QuantizeFp8:
        """Return the operation that quantises again; it rounds, this one did not."""
        return QuantizeFp8(self.block, self.e8m0)


@dataclass(frozen=True, slots=True)
class QuantizeFp8:
    """A float ``[…, O, I]`` becomes E4M3 and scales ``[…, o, i]``.

    A block's scale is its largest magnitude over 448, E4M3's largest number, as
    float32; or the next power of two above that, as an E8M0 byte. A block of zeros
    gets 1.
    """

    block: tuple[int, int]
    e8m0: bool = False

    def result(self, given: Operand, target: str) -> Operand:
        """Add scales; the shape stays, the dtype becomes E4M3."""
        (weight,) = given.weights
        kind = "F8_E8M0" if self.e8m0 else "F32"
        scales = Spec(kind, scale_grid(weight.shape, self.block))
        return Operand((Spec("F8_E4M3", weight.shape),), (scales,))

    def inverse(self) -> DequantizeFp8:
        """Return the operation that multiplies the scales back."""
        return DequantizeFp8(self.block, self.e8m0)


@dataclass(frozen=True, slots=True)
class Transpose:
    """``[…, O, I]`` becomes ``[…, I, O]``; it undoes itself."""

    def result(self, given: Operand, target: str) -> Operand:
        """Exchange the last two axes; dtypes stay."""
        if given.scales:
            raise ValueError(f"{given} is quantised and cannot be transposed")
        return Operand(
            tuple(Spec(w.dtype, (*w.shape[:-2], w.shape[-1], w.shape[-2])) for w in given.weights)
        )

    def inverse(self) -> Transpose:
        """Return itself."""
        return self


@dataclass(frozen=True, slots=True)
class SplitGateUp:
    """Combined experts ``[E, 2I, H]`` become gate ``[E, I, H]`` and up ``[E, I, H]``.

    Attributes:
        interleaved: whether gate and up take turns, row by row; else gate is first.
        axis: which is split: ``-2``, or ``-1`` for biases ``[E, 2I]``.
    """

    interleaved: bool = False
    axis: int = -2

    def result(self, given: Operand, target: str) -> Operand:
        """Halve the axis; the dtype stays."""
        (weight,) = given.weights
        size = weight.shape[self.axis]
        if size % 2 or given.scales:
            raise ValueError(f"{given} is no combined gate and up")
        return Operand((_resized(weight, self.axis, size // 2),) * 2)

    def inverse(self) -> JoinGateUp:
        """Return the operation that puts the halves together."""
        return JoinGateUp(self.interleaved, self.axis)


@dataclass(frozen=True, slots=True)
class JoinGateUp:
    """Gate and up, ``[E, I, H]`` each, become one ``[E, 2I, H]``; see ``SplitGateUp``."""

    interleaved: bool = False
    axis: int = -2

    def result(self, given: Operand, target: str) -> Operand:
        """Double the axis; the dtype stays."""
        gate, up = given.weights
        if gate != up or given.scales:
            raise ValueError(f"{given} is no gate and up")
        return Operand((_resized(gate, self.axis, 2 * gate.shape[self.axis]),))

    def inverse(self) -> SplitGateUp:
        """Return the operation that takes the halves apart."""
        return SplitGateUp(self.interleaved, self.axis)


def _resized(spec: Spec, axis: int, size: int) -> Spec:
    shape = list(spec.shape)
    shape[axis] = size
    return Spec(spec.dtype, tuple(shape))


@dataclass(frozen=True, slots=True)
class Add:
    """A number is added to every value, in float32: norms that are stored less 1.

    The result keeps its dtype; float32 serving gets it as float32.
    """

    number: float

    def result(self, given: Operand, target: str) -> Operand:
        """Keep the shape."""
        return given

    def inverse(self) -> Add:
        """Return the operation that subtracts it again."""
        return Add(-self.number)


@dataclass(frozen=True, slots=True)
class SplitRows:
    """``[P·O, …]`` becomes ``P`` tensors ``[O, …]``, one after the other."""

    parts: int

    def result(self, given: Operand, target: str) -> Operand:
        """Divide the first axis."""
        (weight,) = given.weights
        if weight.shape[0] % self.parts:
            raise ValueError(f"{weight} is not {self.parts} equal parts")
        return Operand((_resized(weight, 0, weight.shape[0] // self.parts),) * self.parts)

    def inverse(self) -> JoinRows:
        """Return the operation that puts the parts together."""
        return JoinRows(self.parts)


@dataclass(frozen=True, slots=True)
class JoinRows:
    """``P`` tensors ``[O, …]`` become one ``[P·O, …]``."""

    parts: int

    def result(self, given: Operand, target: str) -> Operand:
        """Multiply the first axis."""
        if len(given.weights) != self.parts or len(set(given.weights)) != 1:
            raise ValueError(f"{self.parts} equal tensors were expected, not {given.weights}")
        first = given.weights[0]
        return Operand((_resized(first, 0, first.shape[0] * self.parts),))

    def inverse(self) -> SplitRows:
        """Return the operation that takes the parts apart."""
        return SplitRows(self.parts)


@dataclass(frozen=True, slots=True)
class SplitLatent:
    """Latent attention's ``kv_b_proj`` becomes the two matrices that MLX absorbs.

    ``[heads·(n + v), r]`` gives ``embed_q`` ``[heads, r, n]`` and ``unembed_out``
    ``[heads, v, r]``: per head, ``n`` rows for keys without position, ``v`` for values.
    """

    heads: int
    keys: int

    def result(self, given: Operand, target: str) -> Operand:
        """Split the rows of every head."""
        (weight,) = given.weights
        rows, rank = weight.shape
        values = rows // self.heads - self.keys
        if rows % self.heads or values < 1:
            raise ValueError(f"{weight} does not hold {self.heads} heads of {self.keys} keys")
        return Operand(
            (
                Spec(weight.dtype, (self.heads, rank, self.keys)),
                Spec(weight.dtype, (self.heads, values, rank)),
            )
        )

    def inverse(self) -> JoinLatent:
        """Return the operation that puts the two together."""
        return JoinLatent(self.heads, self.keys)


@dataclass(frozen=True, slots=True)
class JoinLatent:
    """``embed_q`` and ``unembed_out`` become ``kv_b_proj``; see ``SplitLatent``."""

    heads: int
    keys: int

    def result(self, given: Operand, target: str) -> Operand:
        """Join the rows of every head."""
        embed, unembed = given.weights
        rows = self.heads * (self.keys + unembed.shape[1])
        return Operand((Spec(embed.dtype, (rows, unembed.shape[2])),))

    def inverse(self) -> SplitLatent:
        """Return the operation that takes them apart."""
        return SplitLatent(self.heads, self.keys)


Op: TypeAlias = (
    StackExperts
    | UnstackExperts
    | DequantizeFp8
    | QuantizeFp8
    | Transpose
    | SplitGateUp
    | JoinGateUp
    | Add
    | SplitRows
    | JoinRows
    | SplitLatent
    | JoinLatent
    | Requantize
    | Unpack
)
