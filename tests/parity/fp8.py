"""Exact FP8: values and scales whose product is the matrix they were made of."""

from __future__ import annotations

import torch


def quantize(
    matrix: torch.Tensor,
    block: tuple[int, int] | None,
    grain: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E4M3 values and one scale per block of the last two axes.

    The scales are the grain times powers of two, drawn anew for every block, so
    that no two neighbours agree. Without a block there is one scalar.
    """
    *lead, rows, columns = matrix.shape
    height, width = block or (rows, columns)
    grid = (*lead, -(-rows // height), -(-columns // width))
    largest = torch.frexp((matrix / grain).abs().amax())[1] - 1
    shift = torch.randint(1, 8, grid if block else (), generator=generator)
    scale = torch.ldexp(torch.full(shift.shape, grain), largest - shift)
    wide = widen(scale, (height, width), rows, columns)
    values = (matrix / wide).to(torch.float8_e4m3fn)
    assert torch.equal(values.float() * wide, matrix), "four bits and a shift must fit E4M3"
    return values, scale


def widen(scale: torch.Tensor, block: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    """Return the scale of every element."""
    if scale.ndim == 0:
        return scale
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., :rows, :columns]
