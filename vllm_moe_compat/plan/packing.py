"""MLX's packed formats as operations: quantise weights while loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vllm_moe_compat.checkpoint.operations import MlxFormat, Op, Operand, Spec


@dataclass(frozen=True, slots=True)
class Requantize(Op):
    """A float ``[…, O, I]`` becomes MLX's packed form, group by group along ``I``.

    The result is ``uint32 […, O, I·bits/32]`` and scales ``[…, O, I/group]``. In mode
    ``affine`` scales have the weight's dtype, and there are biases of the same dtype and shape;
    in other modes a scale is one E8M0 byte. Formats and values are those of
    ``mlx.core.quantize``.
    """

    bits: int
    group: int
    mode: str = "affine"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the rows of a shape are whole groups."""
        return len(shape) > 1 and shape[-1] % self.group == 0

    def result(self, given: Operand, target: str) -> Operand:
        """Pack every weight; add scales and biases."""
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

    @property
    def words(self) -> str:
        """``quantise to affine 8-bit g64``."""
        return f"quantise to {self}"

    @property
    def config(self) -> dict[str, int | str]:
        """The entry of mlx-lm's ``config["quantization"]`` for the format."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}

    def tensors(self, weight: Spec) -> dict[str, Spec]:
        """Return parameter of the module → tensor, for a float weight."""
        packed = self.result(Operand((weight,)), "")
        return {"weight": packed.weights[0], **{r: specs[0] for r, specs in packed.parts.items()}}

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}-bit g{self.group}" if self.mode == "affine" else self.mode


Packing: TypeAlias = Requantize | MlxFormat
"""How a weight is packed: quantised by a setting, or held as the checkpoint stores it."""


def packed_tensors(packing: Packing, weight: Spec) -> dict[str, Spec]:
    """Return parameter of the module → tensor of a packed weight, for its float spec."""
    if isinstance(packing, MlxFormat):
        return packing.tensors(weight.shape)
    return packing.tensors(weight)


QUANTIZE_SETTINGS = {
    "8bit": Requantize(8, 64),
    "mxfp8": Requantize(8, 32, "mxfp8"),
    "6bit": Requantize(6, 64),
    "4bit": Requantize(4, 64),
}
"""Values of ``VLLM_MOE_COMPAT_QUANTIZE`` besides ``none``, the largest format first."""
