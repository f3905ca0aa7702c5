"""A part of a build gives the same part of its values, and reads no more than it says."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.loading import same_bits
from support.stored import stored
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers.fp8_ops import DequantizeFp8, scale_grid
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.plan.build import Build, Restriction
from vllm_moe_compat.plan.estimate import estimate
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts, Transpose
from vllm_moe_compat.plan.planner import Plan

NAMES = {mx.uint8: "F8_E4M3", mx.float32: "F32"}
E, ROWS, COLUMNS = 4, 12, 20


def a_build(layout: str, block: tuple[int, int] | None) -> tuple[Build, dict[str, mx.array]]:
    """A build of targets ``[E, ROWS, COLUMNS]``, and its sources."""
    rng = np.random.default_rng(0)
    shape: tuple[int, ...] = (ROWS, COLUMNS)
    ops: tuple[Any, ...] = ()
    others: tuple[str, ...] = ()
    if layout == "per-expert":
        names = tuple(f"experts.{e}" for e in range(E))
        ops = (StackExperts(E),)
    else:
        names = ("experts",)
        shape = (E, ROWS, COLUMNS)
    after: tuple[Any, ...] = ()
    if layout in ("gate_up", "interleaved"):
        after, others = (SplitGateUp(layout == "interleaved"),), ("up",)
        shape = (E, 2 * ROWS, COLUMNS)
    if layout == "transposed":
        shape, after = (E, COLUMNS, ROWS), (Transpose(),)
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    sources: dict[str, mx.array] = {}
    for name in names:
        if block is None:
            sources[name] = mx.array(rng.standard_normal(shape).astype(np.float32))
            continue
        sources[name] = mx.array(rng.integers(0, 120, shape, dtype=np.uint8))
        grid = scale_grid(shape, block)
        sources[f"{name}_s"] = mx.array(rng.uniform(0.5, 2, grid).astype(np.float32))
    if block is not None:
        parts = (("scale", tuple(f"{name}_s" for name in names)),)
        ops += (DequantizeFp8(block),)
    return Build("out", names, parts, (*ops, *after), others), sources


def spans(size: int) -> st.SearchStrategy[tuple[int, int] | None]:
    cut = st.tuples(st.integers(0, size - 1), st.integers(1, size)).filter(lambda s: s[0] < s[1])
    return st.none() | cut


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.sampled_from(["per-expert", "combined", "gate_up", "interleaved", "transposed"]),
    block=st.sampled_from([None, (4, 4), (5, 7), (1, COLUMNS), (128, 128)]),
    experts=spans(E),
    rows=spans(ROWS),
    columns=spans(COLUMNS),
)
def test_a_part_of_a_build_is_that_part_of_the_whole(
    tmp_path, layout, block, experts, rows, columns
):
    build, sources = a_build(layout, block)
    tensors = {n: TensorInfo(NAMES[a.dtype], tuple(a.shape)) for n, a in sources.items()}
    whole = make_build(build, dict(sources), "float32")
    wanted = Restriction(experts, rows, columns)
    part = build.restricted(wanted)
    given_ = dict(sources)
    made = make_build(part, given_, "float32")
    place = tuple(slice(*(span or (None,))) for span in (experts, rows, columns))
    assert made.keys() == whole.keys()
    for name, array in made.items():
        assert mx.array_equal(array, whole[name][place]).item()
    specs = part.results(tensors, "F32")
    assert [spec.shape for spec in specs] == [tuple(array.shape) for array in made.values()]
    assert part.bytes_read(tensors) <= build.bytes_read(tensors)
    assert set(sources) - set(given_) == set(part.sources)
    files = stored(tmp_path, sources, tensors)
    assert same_bits(make_build(part, dict(files), "float32"), made)
    assert files.bytes_read == part.bytes_read(tensors)


@settings(max_examples=60)
@given(
    layout=st.sampled_from(["per-expert", "combined", "gate_up", "interleaved", "transposed"]),
    block=st.sampled_from([None, (4, 4), (1, COLUMNS)]),
    first=st.tuples(spans(E), spans(ROWS), spans(COLUMNS)),
    data=st.data(),
)
def test_a_part_of_a_part_is_that_part_of_it(layout, block, first, data):
    build, sources = a_build(layout, block)
    one = build.restricted(Restriction(*first))
    (whole, *_) = make_build(one, dict(sources), "float32").values()
    then = tuple(data.draw(spans(size)) for size in whole.shape)
    (part, *_) = make_build(one.restricted(Restriction(*then)), dict(sources), "float32").values()
    assert mx.array_equal(part, whole[tuple(slice(*(s or (None,))) for s in then)]).item()
    assert one.restricted(Restriction()) == one


@pytest.mark.parametrize("interleaved", [None, False, True])
@pytest.mark.parametrize("combined", [False, True])
def test_a_part_of_biases_is_that_part(tmp_path, interleaved, combined):
    """Biases ``[E, O]`` have no rows: those of the weights are their columns."""
    split = () if interleaved is None else (SplitGateUp(interleaved, -1),)
    width, others = (ROWS, ()) if interleaved is None else (2 * ROWS, ("up",))
    whole = mx.arange(E * width, dtype=mx.float32).reshape(E, width)
    sources = {"all": whole} if combined else {f"e{n}": whole[n] for n in range(E)}
    stack = () if combined else (StackExperts(E),)
    build = Build("gate", tuple(sources), (), (*stack, *split), others)
    tensors = {name: TensorInfo("F32", tuple(a.shape)) for name, a in sources.items()}
    made = make_build(build, dict(sources), "float32")
    part = build.restricted(Restriction(experts=(1, 3), columns=(2, 7)))
    files = stored(tmp_path, sources, tensors)
    found = make_build(part, dict(files), "float32")
    assert same_bits(found, {name: array[1:3, 2:7] for name, array in made.items()})
    assert [spec.shape for spec in part.results(tensors, "F32")] == [(2, 5)] * len(found)
    assert files.bytes_read == part.bytes_read(tensors)
    assert files.bytes_read == 2 * 4 * (5 if interleaved is None else width)


@pytest.mark.parametrize("block", [None, (4, 4)])
def test_an_expert_of_its_own_tensors_reads_those_alone(block):
    build, sources = a_build("per-expert", block)
    tensors = {n: TensorInfo(NAMES[a.dtype], tuple(a.shape)) for n, a in sources.items()}
    one = build.restricted(Restriction(experts=(2, 3)))
    assert one.weights == ("experts.2",)
    assert one.bytes_read(tensors) * E == build.bytes_read(tensors)
    assert one.restriction is None


def test_the_estimate_follows():
    build, sources = a_build("combined", (4, 4))
    tensors = {n: TensorInfo(NAMES[a.dtype], tuple(a.shape)) for n, a in sources.items()}
    half = build.restricted(Restriction(rows=(0, ROWS // 3 * 2)))
    whole, part = (estimate(Plan("m", "", (b,)), tensors, "F32") for b in (build, half))
    assert part.read == half.bytes_read(tensors) < whole.read == build.bytes_read(tensors)
    assert part.final["none"] * 3 == whole.final["none"] * 2
