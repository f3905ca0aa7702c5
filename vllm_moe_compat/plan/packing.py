"""MLX's own packed formats, as operations of a plan: what is requantised while loading."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_moe_compat.checkpoint.operations import Op, Operand, Spec


@dataclass(frozen=True, slots=True)
class Requantize(Op):
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
        if given.parts or not all(self.fits(spec.shape) for spec in given.weights):
            raise ValueError(f"{given} is not made of whole groups of {self.group}")
        affine = self.mode == "affine"
        scales = tuple(
            Spec(w.dtype if affine else "U8", (*w.shape[:-1], w.shape[-1] // self.group))
            for w in given.weights
        )
        packed = tuple(
            Spec("U32", (*w.shape[:-1], w.shape[-1] * self.bits // 32)) for w in given.weights
        )
        return Operand(packed, {"scales": scales} | ({"biases": scales} if affine else {}))

    def inverse(self) -> Unpack:
        """Return the operation that gives floats again; this one rounds, it does not."""
        return Unpack(self.bits, self.group, self.mode)

    @property
    def words(self) -> str:
        """``quantise to affine 8-bit g64``."""
        return f"quantise to {self}"

    @property
    def config(self) -> dict[str, int | str]:
        """What mlx-lm's ``config["quantization"]`` says of such a weight."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}-bit g{self.group}" if self.mode == "affine" else self.mode


@dataclass(frozen=True, slots=True)
class Unpack(Op):
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

    @property
    def words(self) -> str:
        """``dequantise affine 8-bit g64``."""
        return f"dequantise {Requantize(self.bits, self.group, self.mode)}"


QUANTIZE_SETTINGS = {
    "8bit": Requantize(8, 64),
    "mxfp8": Requantize(8, 32, "mxfp8"),
    "6bit": Requantize(6, 64),
    "4bit": Requantize(4, 64),
}
"""What ``VLLM_MOE_COMPAT_QUANTIZE`` may name, besides ``none``; the largest first."""
