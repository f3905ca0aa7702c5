"""Parts of tensors are read from files: those bytes, and no others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.loading import same_bits
from support.stored import bits, stored, write
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.numbers.fp8_ops import DequantizeFp8
from vllm_moe_compat.dtypes import mlx_dtype
from vllm_moe_compat.errors import CheckpointFileError
from vllm_moe_compat.execute import stack, stored_tensors
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.execute.stored_tensors import StoredTensors, as_array, bytes_of
from vllm_moe_compat.plan.build import Build, Restriction
from vllm_moe_compat.plan.ops import StackExperts
from vllm_moe_compat.plan.tensor_names import TensorNames

KINDS = ["BF16", "F16", "F32", "F8_E4M3", "I8", "U8", "I32", "U32", "I64", "BOOL"]
FILE = "model.safetensors"


def a_tensor(kind: str, shape: tuple[int, ...], seed: int = 0) -> mx.array:
    dtype = mlx_dtype(kind)
    bits = np.random.default_rng(seed).integers(0, 2, (*shape, 8 * dtype.size), np.uint8)
    if kind == "BOOL":
        return mx.array(bits[..., 0].astype(bool))
    octets = np.packbits(bits, axis=-1)
    return mx.array(octets).view(dtype).reshape(shape)


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[slice, ...]]]:
    """A shape, and slices that are applied one after the other."""
    shape = draw(st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple))
    spans = st.slices(6).filter(lambda s: s.step in (None, 1))
    keys = st.lists(spans, max_size=len(shape)).map(tuple)
    return shape, draw(st.lists(keys, max_size=2))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=parts(), kind=st.sampled_from(KINDS), gap=st.sampled_from([0, 7, 4096]))
def test_a_part_has_the_bytes_of_that_part(tmp_path, monkeypatch, part, kind, gap):
    monkeypatch.setattr(stored_tensors, "_AT_ONCE", 40)
    shape, keys = part
    whole = a_tensor(kind, shape)
    tensors = {"before": TensorInfo("U8", (3,)), "t": TensorInfo(kind, shape)}
    files = stored(tmp_path, {"before": mx.zeros(3, mx.uint8), "t": whole}, tensors, gap)
    found, wanted = files["t"], bits(whole)
    for key in keys:
        found, wanted = found[key], wanted[key]
    assert files.bytes_read == 0
    assert (found.shape, found.ndim, found.size) == (wanted.shape, wanted.ndim, wanted.size)
    read = found.read()
    assert read.dtype == found.dtype == mlx_dtype(kind)
    assert np.array_equal(bits(read), wanted)
    assert read.nbytes == found.nbytes
    if gap == 0:
        assert files.bytes_read == found.nbytes
    assert files.bytes_read >= found.nbytes


def test_a_range_of_columns_reads_over_gaps_of_a_page_and_no_larger_ones(tmp_path):
    whole = a_tensor("U8", (5, 9000))
    files = stored(tmp_path, {"t": whole}, {"t": TensorInfo("U8", whole.shape)}, gap=4096)
    near, far = files["t"][:, 100:8000], files["t"][:, 100:4000]
    assert same_bits({"": near.read()}, {"": whole[:, 100:8000]})
    assert files.bytes_read == 4 * 9000 + 7900
    before = files.bytes_read
    assert same_bits({"": far.read()}, {"": whole[:, 100:4000]})
    assert files.bytes_read - before == far.nbytes == 5 * 3900


def test_a_tensor_is_read_into_memory_that_is_given(tmp_path):
    whole = a_tensor("BF16", (4, 6, 8))
    files = stored(tmp_path, {"t": whole}, {"t": TensorInfo("BF16", whole.shape)})
    slots = mx.zeros((3, 6, 8), dtype=mx.bfloat16)
    view = bytes_of(slots).reshape(3, -1)
    files["t"][2:3].read_into(view[1])
    assert same_bits({"": slots[1]}, {"": whole[2]})
    assert not mx.any(slots[0]).item()
    with pytest.raises(ValueError, match="has 96 bytes, not"):
        files["t"][2:3].read_into(view.reshape(-1))


def test_another_shape_of_the_whole_reads_nothing(tmp_path):
    whole = a_tensor("F32", (4, 6))
    files = stored(tmp_path, {"t": whole}, {"t": TensorInfo("F32", whole.shape)})
    reshaped = files["t"].reshape(2, -1, 3)
    assert reshaped.shape == (2, 4, 3)
    assert files.bytes_read == 0
    assert same_bits({"": as_array(reshaped[1:])}, {"": whole.reshape(2, 4, 3)[1:]})
    column = files["t"][:, 1:2].reshape(1, 4)
    assert same_bits({"": as_array(column)}, {"": whole[:, 1].reshape(1, 4)})
    with pytest.raises(ValueError, match="cannot become"):
        files["t"].reshape(5, 5)


@pytest.mark.parametrize("key", [3, slice(None, None, 2), (slice(None),) * 3, None])
def test_only_ranges_are_slices(tmp_path, key: Any):
    files = stored(tmp_path, {"t": a_tensor("U8", (4, 6))}, {"t": TensorInfo("U8", (4, 6))})
    with pytest.raises(IndexError, match="does not slice the 2 axes of t"):
        files["t"][key]


def test_names_of_the_plan_lead_to_names_in_the_file(tmp_path):
    arrays = {n: a_tensor("U8", (4,), seed) for seed, n in enumerate("abc")}
    tensors = {name: TensorInfo("U8", (4,)) for name in arrays}
    write(tmp_path, arrays, tensors)
    names = TensorNames(renamed=(("a", "b"), ("b", "a")), copies=(("d", "a"),))
    files = StoredTensors(tmp_path, names.of(read_headers(tmp_path)), names)
    assert set(files) == {"a", "b", "c", "d"}
    found = {name: tensor.read() for name, tensor in files.items()}
    wanted = {"a": arrays["b"], "b": arrays["a"], "c": arrays["c"], "d": arrays["b"]}
    assert same_bits(found, wanted)


def test_a_dtype_that_mlx_lacks_is_refused_by_name(tmp_path):
    header = json.dumps({"t": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}).encode()
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    files = StoredTensors(tmp_path, read_headers(tmp_path))
    with pytest.raises(CheckpointFileError, match=f"{FILE}: t is F64, which MLX does not read"):
        files["t"].read()


def test_a_file_that_ends_early_is_refused_by_tensor_and_size(tmp_path):
    whole = a_tensor("U8", (4, 100))
    files = stored(tmp_path, {"t": whole}, {"t": TensorInfo("U8", whole.shape)})
    tensor = files["t"]
    size = (tmp_path / FILE).stat().st_size
    os.truncate(tmp_path / FILE, size - 150)
    assert same_bits({"": tensor[:2].read()}, {"": whole[:2]})
    message = f"{FILE}: t could not be read, since it ends after {size - 150:,} bytes, where "
    with pytest.raises(CheckpointFileError, match=f"{message}{size - 100:,} were expected; check"):
        tensor[2:3].read()


def test_a_file_that_changed_since_its_headers_were_read_is_refused(tmp_path):
    whole = a_tensor("U8", (4, 100))
    write(tmp_path, {"t": whole}, {"t": TensorInfo("U8", whole.shape)})
    tensors = read_headers(tmp_path)
    write(tmp_path, {"t": whole.view(mx.int8)}, {"t": TensorInfo("I8", whole.shape)})
    with pytest.raises(CheckpointFileError, match=r"it has I8 \[4, 100\] under t, where U8"):
        StoredTensors(tmp_path, tensors)["t"]
    write(tmp_path, {"s": whole}, {"s": TensorInfo("U8", whole.shape)})
    with pytest.raises(CheckpointFileError, match="it has no such tensor under t, where U8"):
        StoredTensors(tmp_path, tensors)["t"]
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointFileError, match=f"{FILE}: not readable .*No such file"):
        StoredTensors(tmp_path, tensors)["t"]
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(CheckpointFileError, match="it is a pipe, not a regular file"):
        StoredTensors(tmp_path, tensors)["t"]


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "a range beyond the file": ({"data_offsets": [8, 12]}, "bytes 8 to 12 of 8"),
    "another size": ({"data_offsets": [0, 5]}, "where the 4 of U8"),
    "a range that ends before it begins": ({"data_offsets": [6, 2]}, "where the 4 of U8"),
    "negative": ({"shape": [-2, -2]}, r"the shape \[-2, -2\]"),
    "no integers": ({"data_offsets": [0, 4.0]}, "at 0 to 4.0"),
    "booleans": ({"shape": [True, 4]}, "the shape"),
    "no list": ({"shape": "4"}, "the shape '4'"),
    "one offset": ({"data_offsets": [0]}, "no dtype, shape and data_offsets"),
    "an unknown dtype": ({"dtype": "F2"}, "the dtype 'F2'"),
    "a dtype that is no name": ({"dtype": 3}, "the dtype 3"),
    "many axes": ({"shape": [4] + [1] * 20}, "21 axes"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, name: str):
    changed, message = BAD_HEADERS[name]
    header = json.dumps({"t": ENTRY | changed}).encode()
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    tensors = {"t": TensorInfo("U8", (4,), FILE)}
    with pytest.raises(CheckpointFileError, match=f"{FILE}: not a readable .*{message}"):
        StoredTensors(tmp_path, tensors)["t"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x02", (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
     (5).to_bytes(8, "little") + b"nope!", (4).to_bytes(8, "little") + b"\xff{} "],
    ids=["empty", "one byte", "long header", "a list", "no JSON", "no UTF-8"],
)  # fmt: skip
def test_what_is_no_header_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointFileError, match=f"{FILE}: not a readable safetensors file"):
        StoredTensors(tmp_path, {"t": TensorInfo("U8", (4,), FILE)})["t"]


@pytest.mark.parametrize("stacked", [False, True], ids=["combined", "per expert"])
def test_sources_are_read_a_few_experts_at_a_time(tmp_path, monkeypatch, stacked):
    """Beside the result there is never more than a few experts as they are stored."""
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 2**16)
    count, rows, columns = 64, 128, 128
    whole = mx.random.randint(0, 100, (count, rows, columns)).astype(mx.uint8)
    scale = mx.ones((count, 16, 16))
    arrays = {"w": whole, "s": scale}
    if stacked:
        arrays = {f"{n}{e}": array[e] for n, array in arrays.items() for e in range(count)}
    infos = {
        name: TensorInfo("F8_E4M3" if name[0] == "w" else "F32", array.shape)
        for name, array in arrays.items()
    }
    files = stored(tmp_path, arrays, infos)
    del arrays, whole, scale
    names = {part: tuple(name for name in infos if name[0] == part) for part in "ws"}
    ops = (*((StackExperts(count),) if stacked else ()), DequantizeFp8((8, 8)))
    build = Build("out", names["w"], (("scale", names["s"]),), ops)
    share = build.restricted(Restriction(rows=(0, rows // 2)))
    for part, wanted in ((share, count * rows * columns), (build, 2 * count * rows * columns)):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        (made,) = make_build(part, dict(files), "bfloat16").values()
        assert made.nbytes == wanted
        scales = count * 16 * 16 * 4
        assert mx.get_peak_memory() - before < wanted + 2 * scales + 2**19
        del made
