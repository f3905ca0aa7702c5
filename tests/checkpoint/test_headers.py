"""Headers, and whatever may stand where a header should."""

from __future__ import annotations

import contextlib
import json
import os
import re
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

from vllm_moe_compat.checkpoint.extras import DEFAULT_EXTRAS, Ignored
from vllm_moe_compat.checkpoint.files import refuse
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.index import INDEX, contradictions, read_index
from vllm_moe_compat.errors import CheckpointFileError


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
    start = time.process_time()
    assert len(read_headers(tmp_path)) == 61_440
    assert time.process_time() - start < 2


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


def check_index(path: Path, tensors: dict[str, TensorInfo]) -> None:
    """Raise for the first contradiction between the index and the shards."""
    index = read_index(path, refuse) or {}
    for fault in contradictions(path, index, tensors, Ignored(DEFAULT_EXTRAS)):
        refuse(fault)


def expect_named_or_fine(path: Path) -> None:
    with contextlib.suppress(CheckpointFileError):
        check_index(path, read_headers(path))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
@pytest.mark.parametrize("file", ["model.safetensors", INDEX])
def test_what_is_no_file_is_named_and_not_opened(file: str, kind: str, tmp_path: Path):
    path = tmp_path / file
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointFileError, match=rf"^{re.escape(file)}: not ") as told:
        check_index(tmp_path, read_headers(tmp_path))
    words = {"pipe": "it is a pipe", "folder": "it is a directory", "device": "it is a device"}
    assert words.get(kind, "symbolic links") in str(told.value)


def test_a_name_that_a_header_has_twice_is_named(tmp_path: Path):
    one = entry()[1:-1]
    write(tmp_path, b"{" + one + b"," + one + b"}", b"\0" * 4)
    with pytest.raises(CheckpointFileError, match="header has a twice"):
        read_headers(tmp_path)


def test_what_only_looks_like_an_entry_is_no_second_one(tmp_path: Path):
    metadata = json.dumps({"__metadata__": {"data_offsets": "a"}})[1:-1].encode()
    write(tmp_path, b"{" + metadata + b"," + entry()[1:-1] + b"}", b"\0" * 4)
    assert set(read_headers(tmp_path)) == {"a"}


def test_an_index_that_names_a_tensor_twice_is_named(tmp_path: Path):
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    twice = '{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}'
    (tmp_path / INDEX).write_text(twice)
    with pytest.raises(CheckpointFileError, match="it has a twice"):
        check_index(tmp_path, read_headers(tmp_path))
