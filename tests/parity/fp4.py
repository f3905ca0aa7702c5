"""Exact FP4: bytes and scales whose product is the matrix they were made of.

The matrices are those of ``reference.six_steps``: 0, 1, 2, 3, 4 and 6 times a unit. E2M1 has
these numbers and their halves, so a group of columns may have either of two scales; they are
drawn, so that no two neighbours need agree. A global scale is drawn for every matrix.
"""

from __future__ import annotations

import math

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUPS = {"nvfp4": 16, "mxfp4": 32}


def fits(matrix: torch.Tensor, mode: str) -> bool:
    """Whether the rows are whole groups."""
    return matrix.ndim > 1 and matrix.shape[-1] % GROUPS[mode] == 0


def quantize(
    matrix: torch.Tensor, mode: str, grain: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bytes ``[…, O, I/2]``, scales ``[…, O, I/g]`` and global scales ``[…]``, factors."""
    group = GROUPS[mode]
    *lead, rows, columns = matrix.shape
    unit = matrix.abs()[matrix != 0].min()
    shift = torch.randint(0, 2, (*lead, rows, columns // group), generator=generator)
    steps = (matrix / unit).round()
    halved = steps / 2.0 ** shift.repeat_interleave(group, -1)
    codes = (halved.abs()[..., None] == E2M1).int()
    assert codes.sum(-1).eq(1).all(), "six steps and a shift must be E2M1's numbers"
    nibbles = codes.argmax(-1) + 8 * (halved < 0).int()
    packed = (nibbles[..., 0::2] + 16 * nibbles[..., 1::2]).to(torch.uint8)
    if mode == "mxfp4":
        exponents = round(math.log2(unit)) + shift
        scale = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        shared = torch.ones(tuple(lead))
    else:
        power = torch.randint(-8, -2, tuple(lead), generator=generator)
        shared = grain * 2.0**power
        scale = (unit * 2.0**shift / shared[..., None, None]).to(torch.float8_e4m3fn)
    assert torch.allclose(dequantize(packed, scale, shared), matrix, rtol=1e-6, atol=0)
    return packed, scale, shared


def dequantize(packed: torch.Tensor, scale: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Return ``E2M1 · scale · global scale`` in float32, by the definition."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    values = E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    wide = scale.float().repeat_interleave(values.shape[-1] // scale.shape[-1], -1)
    return values * wide * shared[..., None, None]


def tensors(
    scheme: str,
    name: str,
    packed: torch.Tensor,
    scale: torch.Tensor,
    shared: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return a weight as a release of ``scheme`` names it."""
    stem = name if name.endswith(".weight") else f"{name}_weight"
    if scheme == "ct nvfp4":
        return {
            f"{name}_packed": packed,
            f"{stem}_scale": scale,
            f"{stem}_global_scale": (1 / shared).reshape(-1),
            f"{name.removesuffix('.weight')}.input_global_scale": torch.tensor([0.5]),
        }
    if scheme == "modelopt nvfp4":
        return {
            name: packed,
            f"{stem}_scale": scale,
            f"{stem}_scale_2": shared.float(),
            f"{stem.removesuffix('weight')}input_scale": torch.tensor(0.5),
        }
    if scheme == "ct mxfp4":
        return {f"{name}_packed": packed, f"{stem}_scale": scale.view(torch.uint8)}
    assert scheme == "deepseek fp4"
    return {name: packed.view(torch.int8), f"{name.removesuffix('weight')}scale": scale}


def config(scheme: str, kept: list[str]) -> dict[str, object]:
    """Return ``quantization_config``; ``kept`` are the modules not converted."""
    if scheme in ("ct nvfp4", "ct mxfp4"):
        mode = scheme.removeprefix("ct ")
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": GROUPS[mode]}
        strategy = "tensor_group" if mode == "nvfp4" else "group"
        group = {"targets": ["Linear"], "weights": weights | {"strategy": strategy}}
        return {
            "quant_method": "compressed-tensors",
            "format": f"{mode}-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": kept,
        }
    if scheme == "deepseek fp4":
        return {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    algorithm = "MIXED_PRECISION" if "mixed" in scheme else "NVFP4"
    return {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": 16, "ignore": kept}
