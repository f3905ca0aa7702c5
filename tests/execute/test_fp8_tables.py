"""FP8 by table gives MLX's own products."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_compat.checkpoint.numbers.fp8_ops import DequantizeFp8
from vllm_moe_compat.dtypes import mlx_dtype
from vllm_moe_compat.execute import build_tensor, fp8_pairs, fp8_tables
from vllm_moe_compat.execute.fp8_tables import bits
from vllm_moe_compat.execute.numbers import fp8
from vllm_moe_compat.execute.stack import Arrays
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts

BLOCKS = [(128, 128), (64, 32), (1, 2048), (4096, 4096), (100, 24), (3, 5)]


def product(weight: mx.array, scale: mx.array, block: tuple[int, int], dtype: str) -> mx.array:
    """By conversion and multiplication, weight by weight."""
    rows, columns = weight.shape[1:]
    wide = mx.repeat(mx.repeat(scale, block[0], axis=1)[:, :rows], block[1], axis=2)[:, :, :columns]
    return (mx.from_fp8(weight, dtype=mx.float32) * wide).astype(mlx_dtype(dtype))


def operands(
    shape: tuple[int, int, int], block: tuple[int, int], seed: int
) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    grid = (shape[0], -(-shape[1] // block[0]), -(-shape[2] // block[1]))
    # Every byte, the two that are not numbers too.
    weight = mx.array(rng.integers(0, 256, shape, dtype=np.uint8))
    return weight, mx.array(rng.uniform(1e-4, 1e-2, grid).astype(np.float32))


def same(found: mx.array, wanted: mx.array) -> bool:
    return found.dtype == wanted.dtype and np.array_equal(bits(found), bits(wanted))


@settings(max_examples=80, deadline=None)
@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block=st.sampled_from(BLOCKS),
    indices=st.sampled_from([1, 1000, 2**17]),
    entries=st.sampled_from([1, 2**12, 2**21]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 2**16),
)
def test_a_table_gives_the_products_bit_for_bit(
    experts, rows, columns, block, indices, entries, dtype, seed
):
    weight, scale = operands((experts, rows, columns), block, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_tables, "_INDICES", indices)
        patch.setattr(fp8_tables, "_ENTRIES", entries)
        patch.setattr(fp8_pairs, "_AT_ONCE", indices)
        found = fp8.by_table(weight, scale, block, dtype)
    assert same(found, product(weight, scale, block, dtype))


@pytest.mark.parametrize("scales", [(1e-4, 1e-2), (1e-45, 1e-38), (1e30, 3e38)])
@pytest.mark.parametrize("block", BLOCKS)
def test_pairs_are_rounded_to_bfloat16_and_held_in_it_or_in_float32(block, scales):
    weight, _ = operands((2, 70, 90), block, 5)
    grid = (2, -(-70 // block[0]), -(-90 // block[1]))
    scale = mx.array(np.random.default_rng(1).uniform(*scales, grid).astype(np.float32))
    for allowed in (weight, mx.where(weight % 128 == 127, 0, weight)):
        exact, found = np.empty((2, 2, 70, 90), np.uint32)
        half = np.empty((2, 70, 90), np.uint16)
        for rounded, target in ((False, exact), (True, found), (True, half)):
            pairs = fp8_pairs.Pairs(np.array(scale), block, 90, rounded=rounded)
            for expert in range(2):
                for first in (0, 33):
                    rows = slice(first, 33 if first == 0 else 70)
                    pairs.write(expert, first, bits(allowed)[expert, rows], target[expert, rows])
        wanted = product(allowed, scale, block, "float32")
        assert np.array_equal(exact, bits(wanted))
        assert np.array_equal(found, bits(wanted.astype(mx.bfloat16).astype(mx.float32)))
        assert np.array_equal(half, bits(wanted.astype(mx.bfloat16)))


@pytest.mark.parametrize("block", [(128, 128), (96, 64), (1, 512), (512, 512)])
def test_halves_go_straight_into_their_targets_wherever_blocks_end(block):
    shape = (5, 400, 512)  # A half has 200 rows, which no block divides.
    weight, scale = operands(shape, block, 3)
    wanted = product(weight, scale, block, "bfloat16")
    given_ = Arrays([weight[e] for e in range(5)], {"scale": [scale[e] for e in range(5)]})
    ops = (StackExperts(5), DequantizeFp8(block), SplitGateUp())
    with pytest.MonkeyPatch.context() as patch:
        taken = []
        tables = fp8_tables.Tables
        patch.setattr(fp8_tables, "Tables", lambda *args: taken.append(1) or tables(*args))
        made = build_tensor.make_tensors(ops, given_, ["gate", "up"], "bfloat16")
    assert bool(taken) == (block[0] * block[1] >= 8 * fp8_tables.VALUES)
    assert same(made["gate"], mx.contiguous(wanted[:, :200]))
    assert same(made["up"], mx.contiguous(wanted[:, 200:]))
    assert given_.weights == []


def test_small_blocks_are_multiplied():
    assert fp8_tables.pays(512, 512, (128, 128))
    assert not fp8_tables.pays(512, 512, (4, 4))
    assert not fp8_tables.pays(512, 64, (1, 128))
