"""Headers, and whatever may stand where a header should."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from vllm_moe_compat.errors import CheckpointFileError
from vllm_moe_compat.layout import TensorInfo, check_index, read_headers


def test_dtypes_that_mlx_calls_the_same_are_told_apart(tmp_path: Path):
    tensors = {
        "a": torch.zeros(2, 3).to(torch.float8_e4m3fn),
        "b": torch.zeros(4, dtype=torch.uint8),
        "c": torch.ones(1).to(torch.float8_e8m0fnu),
        "d": torch.tensor(1.0, dtype=torch.bfloat16),
    }
    save_torch(tensors, tmp_path / "model.safetensors")
    assert read_headers(tmp_path) == {
        "a": TensorInfo("F8_E4M3", (2, 3), "model.safetensors"),
        "b": TensorInfo("U8", (4,), "model.safetensors"),
        "c": TensorInfo("F8_E8M0", (1,), "model.safetensors"),
        "d": TensorInfo("BF16", (), "model.safetensors"),
    }


def test_only_the_files_that_mlx_lm_loads_are_read(tmp_path: Path):
    save_file({"a": np.zeros(1)}, tmp_path / "model-1.safetensors")
    (tmp_path / "adapter.safetensors").write_bytes(b"no")
    (tmp_path / "model.bin").write_bytes(b"no")
    assert set(read_headers(tmp_path)) == {"a"}


def test_no_weights_are_no_tensors(tmp_path: Path):
    assert read_headers(tmp_path) == {}
    check_index(tmp_path, {})


def test_links_into_a_cache_are_followed(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": np.zeros(1)}, tmp_path / "blobs" / "ab12")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/ab12")
    assert set(read_headers(tmp_path / "snapshot")) == {"a"}


def test_a_link_to_nothing_is_named(tmp_path: Path):
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointFileError, match=r"^model\.safetensors: "):
        read_headers(tmp_path)


def test_sixty_thousand_tensors_take_well_under_two_seconds(tmp_path: Path):
    entries = {
        f"layers.{n}.experts.{e}.{p}.weight": {
            "dtype": "F8_E4M3",
            "shape": [0, 4],
            "data_offsets": [0, 0],
        }
        for n in range(40)
        for e in range(512)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    write(tmp_path, json.dumps(entries).encode())
    start = time.perf_counter()
    assert len(read_headers(tmp_path)) == 61_440
    assert time.perf_counter() - start < 2


def write(path: Path, header: bytes, data: bytes = b"") -> None:
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(**changes: object) -> bytes:
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
    return json.dumps({"a": tensor}).encode()


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"{}}",
        b'{"a": 1}',
        b"\xff\xff",
        entry(dtype="F33"),
        entry(dtype=None),
        entry(shape=[2]),
        entry(shape=[-1]),
        entry(shape="1"),
        entry(shape=[2**63, 2**63]),
        entry(data_offsets=[0, 400]),
        entry(data_offsets=[4, 0]),
        entry(data_offsets=[2**64, 2**64]),
        entry(data_offsets=[0]),
        b"[" * 10_000,
    ],
)
def test_a_header_that_is_none_is_named(header: bytes, tmp_path: Path):
    write(tmp_path, header, b"\0" * 4)
    with pytest.raises(CheckpointFileError, match=r"^model\.safetensors: "):
        read_headers(tmp_path)


def test_a_header_longer_than_the_file_is_named(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointFileError):
        read_headers(tmp_path)


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_named(data: bytes, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(data)
    expect_named_or_fine(tmp_path)


@FUZZ
@given(data=st.data())
def test_a_file_with_bytes_changed_is_read_or_named(data: st.DataObject, tmp_path: Path):
    save_file({"a": np.zeros((2, 3)), "b": np.zeros(4, np.uint8)}, tmp_path / "model.safetensors")
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    expect_named_or_fine(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@FUZZ
@given(index=JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_any_index_is_fine_or_named(index: object, tmp_path: Path):
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    expect_named_or_fine(tmp_path)


def expect_named_or_fine(path: Path) -> None:
    with contextlib.suppress(CheckpointFileError):
        check_index(path, read_headers(path))
