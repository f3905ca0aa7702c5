"""Weights in the published forms of stored numbers, drawn at random.

A form writes one matrix ``[O, I]`` under the names and in the shapes that its releases have.
Words are random bits; scales keep values near ``1 / sqrt(I)``, so that a model's activations
stay finite. A process that only loads imports no torch from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

GROUP, BLOCK, NVFP4_GROUP = 128, 128, 16
Store = Callable[[np.random.Generator, str, int, int], "dict[str, torch.Tensor]"]


@dataclass(frozen=True)
class Form:
    """A form; ``store(draw, module, O, I)`` returns the tensors of ``module``'s weight.

    Attributes:
        config: ``quantization_config`` of a release.
        growth: bytes in memory for each byte on the disk.
    """

    store: Store
    config: dict[str, Any]
    growth: int = 1


def fp8(draw: np.random.Generator, module: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    import torch

    # A normal weight in blocks scaled to E4M3's range is mostly this.
    values = draw.standard_normal((64, columns), dtype=np.float32) * 100
    values = np.tile(values.clip(-448, 448), (rows // 64, 1))
    scale = torch.from_numpy(draw.uniform(1e-4, 1e-3, (rows // BLOCK, columns // BLOCK)))
    return {
        f"{module}.weight": torch.from_numpy(values).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_inv": scale.to(torch.bfloat16),
    }


def pack_quantized(
    draw: np.random.Generator, module: str, rows: int, columns: int
) -> dict[str, torch.Tensor]:
    import torch

    return {
        f"{module}.weight_packed": words(draw, rows, columns // 8),
        f"{module}.weight_scale": scales(draw, rows, columns // GROUP, columns).to(torch.bfloat16),
        f"{module}.weight_shape": torch.tensor([rows, columns]),
    }


def gptq(
    draw: np.random.Generator, module: str, rows: int, columns: int
) -> dict[str, torch.Tensor]:
    import torch

    groups = columns // GROUP
    return {
        f"{module}.qweight": words(draw, columns // 8, rows),
        # A stored zero point is one less than its value: 8 in the middle of the range.
        f"{module}.qzeros": torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32),
        f"{module}.scales": scales(draw, groups, rows, columns),
        f"{module}.g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }


def awq(draw: np.random.Generator, module: str, rows: int, columns: int) -> dict[str, torch.Tensor]:

    groups = columns // GROUP
    return {
        f"{module}.qweight": words(draw, columns, rows // 8),
        f"{module}.qzeros": words(draw, groups, rows // 8),
        f"{module}.scales": scales(draw, groups, rows, columns),
    }


def nvfp4(
    draw: np.random.Generator, module: str, rows: int, columns: int
) -> dict[str, torch.Tensor]:
    """The global scale is 1, so that layers without one compute the same numbers."""

    import torch

    packed = draw.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    # E2M1's random bits have a spread of 2.7, and E4M3 is fine enough above 2^-8.
    scale = draw.uniform(0.5, 2.0, (rows, columns // NVFP4_GROUP)) * columns**-0.5 / 2.7
    return {
        f"{module}.weight_packed": torch.from_numpy(packed),
        f"{module}.weight_scale": torch.from_numpy(scale).to(torch.float8_e4m3fn),
        f"{module}.weight_global_scale": torch.ones(1),
        f"{module}.input_global_scale": torch.ones(1),
    }


def words(draw: np.random.Generator, rows: int, columns: int) -> torch.Tensor:
    """Random int32 ``[rows, columns]``."""

    import torch

    return torch.from_numpy(draw.integers(-(2**31), 2**31, (rows, columns), dtype=np.int32))


def scales(draw: np.random.Generator, rows: int, columns: int, inputs: int) -> torch.Tensor:
    """Float16 scales ``[rows, columns]`` of 4-bit integers for that many inputs."""

    import torch

    spread = draw.uniform(0.5, 2.0, (rows, columns)) * inputs**-0.5 / 8
    return torch.from_numpy(spread.astype(np.float16))


def compressed(format_: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


FORMS = {
    "fp8": Form(fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}, growth=2),
    "int4": Form(
        pack_quantized,
        compressed(
            "pack-quantized",
            {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": GROUP,
                "symmetric": True,
            },
        ),
    ),
    "nvfp4": Form(
        nvfp4,
        compressed(
            "nvfp4-pack-quantized",
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": NVFP4_GROUP,
                "symmetric": True,
            },
        ),
    ),
    "gptq": Form(
        gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
        },
    ),
    "awq": Form(
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
}
