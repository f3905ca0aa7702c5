"""Carrying out a plan: exact values, bounded memory, sources given back."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.checkpoints import dequantize as oracle
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers.fp8_ops import DequantizeFp8, QuantizeFp8, scale_grid
from vllm_moe_compat.checkpoint.operations import Operand, Spec
from vllm_moe_compat.execute import arrays, stack
from vllm_moe_compat.execute import run_plan as ex
from vllm_moe_compat.execute.build_tensor import make_tensors
from vllm_moe_compat.execute.numbers import fp8
from vllm_moe_compat.execute.stack import Arrays
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.ops import SplitLatent, SplitRows, StackExperts, UnstackExperts
from vllm_moe_compat.plan.planner import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALES = {mx.float32: torch.float32, mx.bfloat16: torch.bfloat16, mx.float16: torch.float16}


def random_fp8(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Every E4M3 byte but the two that are not numbers."""
    values = rng.integers(0, 254, shape, dtype=np.uint8)
    return np.where(values >= 127, values + 1, values).astype(np.uint8)


def scales(shape: tuple[int, ...], dtype: mx.Dtype, rng: np.random.Generator) -> mx.array:
    return mx.array(rng.uniform(1e-4, 1e-2, shape).astype(np.float32)).astype(dtype)


def expected(
    weight: np.ndarray, scale: mx.array, block: tuple[int, int], dtype: str
) -> torch.Tensor:
    values = torch.tensor(weight).view(torch.float8_e4m3fn)
    factors = torch.tensor(np.array(scale.astype(mx.float32)))
    return oracle(values, factors, block).to(DTYPES[dtype])


def dequantize(weight: mx.array, scale: mx.array, block: tuple[int, int], dtype: str) -> mx.array:
    return arrays.dequantize(weight, DequantizeFp8(block), {"scale": scale}, dtype)


def equal(found: mx.array, wanted: torch.Tensor) -> bool:
    as_float = np.array(found.astype(mx.float32))
    return found.shape == tuple(wanted.shape) and np.array_equal(as_float, wanted.float().numpy())


def test_every_byte_of_e4m3_has_torchs_value():
    values = np.arange(256, dtype=np.uint8).reshape(2, 128)
    found = dequantize(mx.array(values), mx.ones((1, 1)), (128, 128), "float32")
    wanted = torch.tensor(values).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(np.array(found), wanted, equal_nan=True)


BLOCKS = st.sampled_from([(128, 128), (64, 32), (1, 128), (128, 1), (3, 5)])


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    block=BLOCKS,
    scale=st.sampled_from(list(SCALES)),
    dtype=st.sampled_from(list(DTYPES)),
    budget=st.sampled_from([1, 2000, 50_000, 2**24]),
    seed=st.integers(0, 2**16),
)
def test_dequantising_rounds_the_exact_product_once(
    lead, rows, columns, block, scale, dtype, budget, seed
):
    rng = np.random.default_rng(seed)
    weight = random_fp8((*lead, rows, columns), rng)
    factors = scales(scale_grid(weight.shape, block), scale, rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "TEMPORARY_BYTES", budget)
        found = dequantize(mx.array(weight), factors, block, dtype)
    assert equal(found, expected(weight, factors, block, dtype))


@settings(max_examples=30, deadline=None)
@given(
    experts=st.integers(1, 6),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    block=BLOCKS,
    budget=st.sampled_from([1, 5000, 2**24]),
    seed=st.integers(0, 2**16),
)
def test_stacking_first_equals_dequantising_first(experts, rows, columns, block, budget, seed):
    rng = np.random.default_rng(seed)
    weights = [mx.array(random_fp8((rows, columns), rng)) for _ in range(experts)]
    factors = [scales(scale_grid((rows, columns), block), mx.float32, rng) for _ in weights]
    each = [dequantize(w, s, block, "bfloat16") for w, s in zip(weights, factors, strict=True)]
    store = {f"w{e}": w for e, w in enumerate(weights)} | {
        f"s{e}": s for e, s in enumerate(factors)
    }
    build = Build(
        "out",
        tuple(f"w{e}" for e in range(experts)),
        (("scale", tuple(f"s{e}" for e in range(experts))),),
        (StackExperts(experts), DequantizeFp8(block)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "TEMPORARY_BYTES", budget)
        ex.run_plan(Plan("m", "", (build,)), store, "bfloat16")
    assert list(store) == ["out"]
    assert mx.array_equal(store["out"].view(mx.uint16), mx.stack(each).view(mx.uint16))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 150),
    block=BLOCKS,
    seed=st.integers(0, 2**16),
)
def test_quantising_undoes_dequantising(rows, columns, block, seed):
    rng = np.random.default_rng(seed)
    op = QuantizeFp8(block)
    weight = mx.array(rng.standard_normal((2, rows, columns)).astype(np.float32))
    packed = arrays.run(op, Arrays([weight]), "float32")
    values = arrays.run(op.inverse(), packed, "float32").weights[0]
    again = arrays.run(op, Arrays([values]), "float32")
    assert mx.array_equal(again.weights[0], packed.weights[0])
    assert mx.allclose(again.parts["scale"][0], packed.parts["scale"][0], rtol=1e-6)
    # E4M3 keeps four significant bits: half a step is 1/16 of the number.
    largest = mx.abs(weight).max().item()
    assert mx.abs(values - weight).max().item() <= largest / 16
    spec = Operand((Spec("F32", weight.shape),))
    result = op.result(spec, "F32")
    assert packed.weights[0].shape == result.weights[0].shape
    assert packed.parts["scale"][0].shape == result.parts["scale"][0].shape
    assert op.inverse().result(result, "F32") == spec


def test_a_block_of_zeros_quantises_to_zeros():
    packed, scale = fp8.quantize(mx.zeros((4, 4)), (2, 2))
    assert not packed.any().item()
    assert (scale == 1).all().item()


def test_unstacking_undoes_stacking():
    weights = [mx.full((3, 5), e, dtype=mx.uint8) for e in range(4)]
    factors = [mx.full((1, 1), float(e)) for e in range(4)]
    op = StackExperts(4)
    stacked = arrays.run(op, Arrays(list(weights), {"scale": list(factors)}), "float32")
    whole = Arrays([stacked.weights[0].take(0, 4)], stacked.parts)
    apart = arrays.run(op.inverse(), whole, "float32")
    assert all(mx.array_equal(a, b).item() for a, b in zip(apart.weights, weights, strict=True))
    assert all(
        mx.array_equal(a, b).item() for a, b in zip(apart.parts["scale"], factors, strict=True)
    )
    assert isinstance(op.inverse(), UnstackExperts)


def test_rows_and_latent_attention_split_as_their_formulas_say():
    rng = np.random.default_rng(0)
    heads, keys, values, rank = 3, 4, 2, 5
    weight = rng.standard_normal((heads * (keys + values), rank)).astype(np.float32)
    given = Arrays([mx.array(weight)])
    thirds = arrays.run(SplitRows(3), given, "float32").weights
    np.testing.assert_array_equal(np.stack(list(map(np.array, thirds))), np.split(weight, 3))
    embed, unembed = arrays.run(SplitLatent(heads, keys), given, "float32").weights
    latent = rng.standard_normal(rank).astype(np.float32)
    by_head = (weight @ latent).reshape(heads, keys + values)
    keys_found = np.einsum("hrn,r->hn", np.array(embed), latent)
    values_found = np.einsum("hvr,r->hv", np.array(unembed), latent)
    np.testing.assert_allclose(keys_found, by_head[:, :keys], rtol=1e-5)
    np.testing.assert_allclose(values_found, by_head[:, keys:], rtol=1e-5)
    for op in (SplitRows(3), SplitLatent(heads, keys)):
        specs = op.result(Operand((Spec("F32", weight.shape),)), "F32").weights
        assert [w.shape for w in arrays.run(op, given, "float32").weights] == [
            s.shape for s in specs
        ]


def experts_of(count: int, rows: int, columns: int) -> tuple[dict[str, mx.array], Plan]:
    rng = np.random.default_rng(0)
    store, builds = {}, []
    for layer in range(3):
        names = []
        for e in range(count):
            name = f"layers.{layer}.experts.{e}.weight"
            names.append(name)
            store[name] = mx.array(random_fp8((rows, columns), rng))
            store[f"{name}_scale_inv"] = scales(
                scale_grid((rows, columns), (128, 128)), mx.float32, rng
            )
        ops = (StackExperts(count), DequantizeFp8((128, 128)))
        scale_names = tuple(f"{n}_scale_inv" for n in names)
        builds.append(Build(f"layers.{layer}.out", tuple(names), (("scale", scale_names),), ops))
    mx.eval(store)
    return store, Plan("m", "", tuple(builds))


def test_the_peak_is_the_final_size_plus_a_fraction_of_one_layer(monkeypatch):
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 2**20)
    store, plan = experts_of(16, 256, 512)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    ex.run_plan(plan, store, "bfloat16")
    final = sum(array.nbytes for array in store.values())
    layer = final / 3
    # The sources, half the size, are there at the start and go as the targets come.
    assert mx.get_peak_memory() - (before - final / 2) < final + 1.5 * layer
    assert mx.get_active_memory() < before - final / 2 + 1.05 * final


def test_only_what_the_plan_names_is_touched():
    other = mx.ones(3)
    store = {"a": mx.zeros((2, 2), dtype=mx.uint8), "a_s": mx.ones((1, 1)), "b": other, "c": other}
    build = Build("a", ("a",), (("scale", ("a_s",)),), (DequantizeFp8((2, 2)),))
    ex.run_plan(Plan("m", "", (build,), drops=("c", "not there")), store, "float32")
    assert set(store) == {"a", "b"}
    assert store["b"] is other
    assert store["a"].dtype == mx.float32


def test_arrays_are_described_without_being_read():
    lazy = mx.zeros((2, 3), dtype=mx.uint8) + 1
    found = ex.tensor_infos({"a": lazy, "b": mx.zeros((1,), dtype=mx.bfloat16)})
    assert found == {"a": TensorInfo("U8", (2, 3)), "b": TensorInfo("BF16", (1,))}


@pytest.mark.parametrize("name", ["float8", "BF16", "no"])
def test_a_serving_dtype_that_is_none_is_refused(name: str):
    from vllm_moe_compat.load.options import loading_with

    with pytest.raises(ValueError, match=name), loading_with(dtype=name):
        pass


def test_no_caller_keeps_the_sources_alive():
    operand = Arrays([mx.zeros((2, 2), dtype=mx.uint8)] * 2, {"scale": [mx.ones((1, 1))] * 2})
    made = make_tensors((StackExperts(2), DequantizeFp8((2, 2))), operand, ["a"], "float32")
    assert not operand.weights
    assert not operand.parts
    assert made["a"].shape == (2, 2, 2)
