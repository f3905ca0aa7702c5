"""Operations that move values: stacking experts, transposing, splitting and joining.

Axes: ``E`` experts, ``O`` output rows, ``I`` input columns of a projection. Weights in a
stored number form move together with their parts.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_moe_compat.checkpoint.operations import Invertible, Op, Operand, Spec


@dataclass(frozen=True, slots=True)
class StackExperts(Invertible):
    """``E`` tensors ``[O, I]`` become one ``[E, O, I]``; parts are stacked in the same way."""

    experts: int

    def result(self, given: Operand, target: str) -> Operand:
        """Add a first axis; keep dtypes."""
        parts = {role: self._stack(specs) for role, specs in given.parts.items()}
        return Operand(self._stack(given.weights), parts)

    def _stack(self, specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
        # ``count`` compares by identity first, and mostly the specs are one object.
        if len(specs) != self.experts or specs.count(specs[0]) != len(specs):
            raise ValueError(f"{self.experts} equal tensors were expected, not {specs}")
        return (Spec(specs[0].dtype, (self.experts, *specs[0].shape)),)

    def inverse(self) -> UnstackExperts:
        """Return the operation that unstacks."""
        return UnstackExperts(self.experts)

    @property
    def words(self) -> str:
        """``stack 256 experts``."""
        return f"stack {self.experts} experts"


@dataclass(frozen=True, slots=True)
class UnstackExperts(Invertible):
    """One ``[E, O, I]`` becomes ``E`` tensors ``[O, I]``; parts are split in the same way."""

    experts: int

    def result(self, given: Operand, target: str) -> Operand:
        """Remove the first axis; keep dtypes."""
        parts = {role: self._unstack(specs) for role, specs in given.parts.items()}
        return Operand(self._unstack(given.weights), parts)

    def _unstack(self, specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
        if len(specs) != 1 or specs[0].shape[0] != self.experts:
            raise ValueError(f"a stack of {self.experts} was expected, not {specs}")
        return (Spec(specs[0].dtype, specs[0].shape[1:]),) * self.experts

    def inverse(self) -> StackExperts:
        """Return the operation that stacks."""
        return StackExperts(self.experts)

    @property
    def words(self) -> str:
        """``unstack 256 experts``."""
        return f"unstack {self.experts} experts"


@dataclass(frozen=True, slots=True)
class Transpose(Invertible):
    """``[…, O, I]`` becomes ``[…, I, O]``; the operation is its own inverse."""

    def result(self, given: Operand, target: str) -> Operand:
        """Exchange the last two axes; keep dtypes."""
        if given.parts:
            raise ValueError(f"{given} is quantised and cannot be transposed")
        return Operand(
            tuple(Spec(w.dtype, (*w.shape[:-2], w.shape[-1], w.shape[-2])) for w in given.weights)
        )

    def inverse(self) -> Transpose:
        """Return the same operation."""
        return self

    @property
    def words(self) -> str:
        """``transpose``."""
        return "transpose"


@dataclass(frozen=True, slots=True)
class SplitGateUp(Invertible):
    """Combined experts ``[E, 2I, H]`` become gate ``[E, I, H]`` and up ``[E, I, H]``.

    Attributes:
        interleaved: whether rows of gate and up alternate; else all of gate comes first.
        axis: the axis to split: ``-2``, or ``-1`` for biases ``[E, 2I]``.
    """

    interleaved: bool = False
    axis: int = -2

    def result(self, given: Operand, target: str) -> Operand:
        """Halve the axis; keep the dtype."""
        (weight,) = given.weights
        size = weight.shape[self.axis]
        if size % 2 or given.parts:
            raise ValueError(f"{given} is no combined gate and up")
        return Operand((_resized(weight, self.axis, size // 2),) * 2)

    def inverse(self) -> JoinGateUp:
        """Return the operation that joins the halves."""
        return JoinGateUp(self.interleaved, self.axis)

    @property
    def words(self) -> str:
        """``split gate and up``."""
        return f"split {'interleaved ' if self.interleaved else ''}gate and up"


@dataclass(frozen=True, slots=True)
class JoinGateUp(Invertible):
    """Gate and up, ``[E, I, H]`` each, become one ``[E, 2I, H]``; see ``SplitGateUp``."""

    interleaved: bool = False
    axis: int = -2

    def result(self, given: Operand, target: str) -> Operand:
        """Double the axis; keep the dtype."""
        gate, up = given.weights
        if gate != up or given.parts:
            raise ValueError(f"{given} is no gate and up")
        return Operand((_resized(gate, self.axis, 2 * gate.shape[self.axis]),))

    def inverse(self) -> SplitGateUp:
        """Return the operation that splits the halves."""
        return SplitGateUp(self.interleaved, self.axis)

    @property
    def words(self) -> str:
        """``join gate and up``."""
        return "join gate and up"


def _resized(spec: Spec, axis: int, size: int) -> Spec:
    shape = list(spec.shape)
    shape[axis] = size
    return Spec(spec.dtype, tuple(shape))


@dataclass(frozen=True, slots=True)
class Add(Invertible):
    """Add a number to every value, in float32: for norms that are stored minus 1.

    The result has the tensor's dtype, or float32 if the target dtype is float32.
    """

    number: float

    def result(self, given: Operand, target: str) -> Operand:
        """Keep shape and dtype."""
        return given

    def inverse(self) -> Add:
        """Return the operation that subtracts the number."""
        return Add(-self.number)

    @property
    def words(self) -> str:
        """``add 1``."""
        return f"add {self.number:g}"


@dataclass(frozen=True, slots=True)
class SplitRows(Op):
    """``[P·O, …]`` becomes ``P`` tensors ``[O, …]`` of consecutive rows."""

    parts: int

    def result(self, given: Operand, target: str) -> Operand:
        """Divide the first axis."""
        (weight,) = given.weights
        if weight.shape[0] % self.parts:
            raise ValueError(f"{weight} is not {self.parts} equal parts")
        return Operand((_resized(weight, 0, weight.shape[0] // self.parts),) * self.parts)

    @property
    def words(self) -> str:
        """``split into 3``."""
        return f"split into {self.parts}"


@dataclass(frozen=True, slots=True)
class SplitLatent(Op):
    """Latent attention's ``kv_b_proj`` becomes the two matrices that mlx-lm absorbs.

    ``[heads·(n + v), r]`` gives ``embed_q`` ``[heads, r, n]`` and ``unembed_out``
    ``[heads, v, r]``. Each head has ``n`` rows for keys without position and ``v`` for values.
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

    @property
    def words(self) -> str:
        """``split kv_b_proj into embed_q and unembed_out``."""
        return "split kv_b_proj into embed_q and unembed_out"


@dataclass(frozen=True, slots=True)
class AsWords(Op):
    """Packed bytes become the words of MLX, ``uint32 […, O, I/4]``; no bit changes.

    Attributes:
        grouped: whether bytes are stored in groups, ``[…, O, G, b]``, and not ``[…, O, I]``.
    """

    grouped: bool = False

    def result(self, given: Operand, target: str) -> Operand:
        """Count four bytes as one."""
        (weight,) = given.weights
        *lead, last = weight.shape
        if self.grouped:
            *lead, groups = lead
            last *= groups
        if weight.dtype not in ("U8", "I8", "F8_E4M3") or last % 4 or given.parts:
            raise ValueError(f"{given} is not packed in words")
        return Operand((Spec("U32", (*lead, last // 4)),))

    @property
    def words(self) -> str:
        """``read as words``."""
        return "read as words"
