"""The algebra of the operations: shapes, dtypes, inverses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_compat.checkpoint.numbers.fp8_ops import DequantizeFp8, scale_grid
from vllm_moe_compat.checkpoint.operations import Operand, Spec
from vllm_moe_compat.plan.ops import StackExperts

SIZE = st.integers(1, 300)
BLOCK = st.tuples(st.integers(1, 200), st.integers(1, 200))


@pytest.mark.parametrize(
    ("shape", "block", "grid"),
    [
        ((192, 256), (128, 128), (2, 2)),
        ((8, 200, 130), (128, 128), (8, 2, 2)),
        ((192, 256), (1, 128), (192, 2)),
        ((64, 64), (128, 128), (1, 1)),
    ],
)
def test_edge_blocks_count_whole(shape, block, grid):
    assert scale_grid(shape, block) == grid


@given(experts=st.integers(1, 9), rows=SIZE, columns=SIZE, block=BLOCK)
def test_every_operation_and_its_inverse_cancel(experts, rows, columns, block):
    grid = scale_grid((rows, columns), block)
    scales = (Spec("F32", grid),) * experts
    given_ = Operand((Spec("F8_E4M3", (rows, columns)),) * experts, {"scale": scales})
    stack, dequantize = StackExperts(experts), DequantizeFp8(block)
    stacked = stack.result(given_, "BF16")
    assert stacked.weights == (Spec("F8_E4M3", (experts, rows, columns)),)
    assert stack.inverse().result(stacked, "BF16") == given_
    assert stack.inverse().inverse() == stack

    plain = dequantize.result(stacked, "BF16")
    assert plain == Operand((Spec("BF16", (experts, rows, columns)),))
    assert dequantize.inverse().result(plain, "BF16") == stacked
    assert dequantize.inverse().inverse() == dequantize


def test_unequal_tensors_do_not_stack():
    with pytest.raises(ValueError, match="equal"):
        StackExperts(2).result(Operand((Spec("BF16", (1,)), Spec("BF16", (2,)))), "BF16")
    with pytest.raises(ValueError, match="3 equal"):
        StackExperts(3).result(Operand((Spec("BF16", (1,)),) * 2), "BF16")
    with pytest.raises(ValueError, match="stack of 3"):
        StackExperts(3).inverse().result(Operand((Spec("BF16", (2, 1)),)), "BF16")


def test_a_grid_of_another_block_does_not_scale():
    operand = Operand((Spec("F8_E4M3", (192, 192)),), {"scale": (Spec("F32", (2, 2)),)})
    with pytest.raises(ValueError, match="does not scale"):
        DequantizeFp8((64, 64)).result(operand, "BF16")
