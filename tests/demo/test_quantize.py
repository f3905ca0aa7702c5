from __future__ import annotations

import pytest

from vllm_moe_compat.demo.hub_form import quantize


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (192, 64), (1, 257), (130, 129)])
def test_every_value_is_within_half_a_step_of_its_block(rows, columns):
    import torch

    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    weight[: min(rows, 100)] *= 50  # so that blocks differ
    values, scales = quantize(weight)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.bfloat16
    assert scales.shape == (-(-rows // 128), -(-columns // 128))
    assert torch.isfinite(values.float()).all()
    for i in range(rows):
        for j in range(0, columns, 37):
            scale = float(scales[i // 128, j // 128])
            got, want = float(values[i, j]) * scale, float(weight[i, j])
            # 3 bits of mantissa; below 2**-6 the steps are even; the block's
            # largest value may be clipped by what rounding took off its scale.
            assert abs(got - want) <= max(abs(want) / 16, scale * 2**-10) + 1e-6


def test_a_block_of_zeros_stays_zero():
    import torch

    values, scales = quantize(torch.zeros(130, 10))
    assert (values.float() == 0).all()
    assert (scales > 0).all()
