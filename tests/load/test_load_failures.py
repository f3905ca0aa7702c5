"""A load that fails halfway says what failed, gives its memory back, and harms no later one."""

from __future__ import annotations

import gc
import io
import os
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest

import vllm_moe_compat
from support.checkpoints import Fp8, Sizes, build
from support.loading import distance, load
from vllm_moe_compat.errors import CheckpointFileError, InsufficientMemoryError
from vllm_moe_compat.execute.numbers import fp8
from vllm_moe_compat.load import progress
from vllm_moe_compat.load.context import current
from vllm_moe_compat.load.options import loading_with

SIZES = Sizes(hidden=128, intermediate=64, experts=8)
SETTINGS = ["none", "8bit"]


@pytest.fixture(autouse=True, params=SETTINGS)
def _setting(request, monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", request.param)
    with vllm_moe_compat.applied():
        yield


def held() -> int:
    gc.collect()
    mx.clear_cache()
    return int(mx.get_active_memory())


def failing(monkeypatch, error: Exception) -> None:
    """Have a tensor of the last of the four layers raise; 37 are dequantised in all."""
    original, calls = fp8.scales_as_floats, []

    def factors(*args):
        calls.append(1)
        if len(calls) > 32:
            raise error
        return original(*args)

    monkeypatch.setattr(fp8, "scales_as_floats", factors)


def a_good_load_works(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "none")
    checkpoint = build(fp8=Fp8(), sizes=SIZES, seed=5)
    assert distance(load(checkpoint.write(tmp_path / "good")), checkpoint) < 1e-5


def test_a_build_of_the_last_layer_that_raises(tmp_path: Path, monkeypatch):
    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path / "bad")
    before = held()
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("no such kernel"))
        with pytest.raises(
            CheckpointFileError, match=r"layers\.3\..*could not be built \(no such kernel\)"
        ) as caught:
            load(path)
        # Even while the error is kept, and its traceback with the loader's frames.
        assert held() < before + 200_000
        assert isinstance(caught.value.__cause__, RuntimeError)
    assert current.get() is None
    a_good_load_works(tmp_path, monkeypatch)


def test_an_allocation_that_fails_is_called_that(tmp_path: Path, monkeypatch):
    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path / "bad")
    failing(monkeypatch, RuntimeError("[malloc] Unable to allocate 1 bytes."))
    with pytest.raises(InsufficientMemoryError, match="smaller format"):
        load(path)


def truncated_once_loaded(path: Path, monkeypatch) -> None:
    """Cut a shard when its headers have been read, by us and by MLX."""
    shard = sorted(path.glob("*.safetensors"))[1]
    original = mx.load

    def loading(file):
        found = original(file)
        if file == str(shard):
            os.truncate(shard, shard.stat().st_size // 2)
        return found

    monkeypatch.setattr(mlx_lm.utils.mx, "load", loading)


def test_a_shard_cut_off_after_its_header_was_read(tmp_path: Path, monkeypatch):
    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path / "bad")
    before = held()
    with monkeypatch.context() as patch:
        truncated_once_loaded(path, patch)
        with pytest.raises(CheckpointFileError, match=r"model-00002-of-00002.safetensors: when"):
            load(path)
    assert held() < before + 200_000
    a_good_load_works(tmp_path, monkeypatch)


# Older ones do not notice that a read ended early.
@pytest.mark.needs("mlx/include/mlx/io/load.h", "pool_once_")
def test_a_shard_cut_off_while_it_is_read(tmp_path: Path, monkeypatch):
    from vllm_moe_compat.load.context import LoadContext

    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path / "bad")
    before = held()
    with monkeypatch.context() as patch:
        truncated_once_loaded(path, patch)
        patch.setattr(LoadContext, "check_files", lambda self: None)
        with pytest.raises(
            CheckpointFileError, match=r"model-0000.*could not be built \(\[read\].*download"
        ):
            load(path)
    assert held() < before + 200_000
    a_good_load_works(tmp_path, monkeypatch)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_shown_on_a_terminal_for_long_loads_only(tmp_path: Path, monkeypatch):
    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path)

    def shown(stream: io.StringIO, delay: float, wanted: bool = True) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "DELAY_SECONDS", delay)
        with loading_with(progress=wanted):
            load(path)
        return stream.getvalue()

    bar = shown(Terminal(), 0.0)
    assert "Loading checkpoint tensors:" in bar
    assert "100% Completed" in bar
    assert "Loading" not in shown(Terminal(), 2.0)
    assert "Loading" not in shown(Terminal(), 0.0, wanted=False)
    assert "Loading" not in shown(io.StringIO(), 0.0)
