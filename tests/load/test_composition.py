"""Over and under another library's wrapper for the same classes: the same result."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import qwen3_5, qwen3_5_moe

import vllm_moe_compat
from support import shim
from support.checkpoints import Fp8, Sizes, build
from support.loading import load, parameters, same_bits
from vllm_moe_compat.load import patching

CLASSES = (qwen3_5.Model, qwen3_5_moe.Model)
STOCK = {cls: cls.__dict__["sanitize"] for cls in CLASSES}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
    vllm_moe_compat.revert()
    yield
    for cls, original in STOCK.items():
        cls.sanitize = original
    vllm_moe_compat.revert()


def stock_is_back() -> bool:
    return all(cls.__dict__["sanitize"] is original for cls, original in STOCK.items())


@pytest.fixture(params=["moe", "dense"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    sizes = Sizes(hidden=192, intermediate=200)
    return build(fp8=Fp8(), dense=request.param == "dense", sizes=sizes).write(tmp_path)


@pytest.fixture
def alone(checkpoint: Path) -> dict[str, mx.array]:
    with vllm_moe_compat.applied():
        return parameters(load(checkpoint))


def test_the_stand_in_does_the_job_by_itself(checkpoint: Path, alone: dict[str, mx.array]):
    shim.install()
    assert same_bits(parameters(load(checkpoint)), alone)


def test_ours_over_the_shim(checkpoint: Path, alone: dict[str, mx.array]):
    shim.install()
    vllm_moe_compat.apply()
    assert same_bits(parameters(load(checkpoint)), alone)


def test_ours_under_the_shim(checkpoint: Path, alone: dict[str, mx.array]):
    vllm_moe_compat.apply()
    shim.install()
    assert same_bits(parameters(load(checkpoint)), alone)


def test_the_shims_mark_is_seen_through_ours(checkpoint: Path):
    shim.install()
    vllm_moe_compat.apply()
    outermost = qwen3_5.Model.sanitize
    shim.install()
    assert qwen3_5.Model.sanitize is outermost


def test_reverted_under_the_shim_ours_is_transparent(checkpoint: Path, alone, monkeypatch):
    vllm_moe_compat.apply()
    remove = shim.install()
    top = {cls: cls.__dict__["sanitize"] for cls in CLASSES}
    vllm_moe_compat.revert()
    assert {cls: cls.__dict__["sanitize"] for cls in CLASSES} == top
    monkeypatch.setattr(patching, "sanitize_hook", None)
    assert same_bits(parameters(load(checkpoint)), alone)
    remove()
    with pytest.raises(ValueError, match="not in model"):
        load(checkpoint)


def test_reverted_over_the_shim_the_shim_is_back(checkpoint: Path, alone: dict[str, mx.array]):
    remove = shim.install()
    theirs = {cls: cls.__dict__["sanitize"] for cls in CLASSES}
    vllm_moe_compat.apply()
    vllm_moe_compat.revert()
    assert {cls: cls.__dict__["sanitize"] for cls in CLASSES} == theirs
    assert same_bits(parameters(load(checkpoint)), alone)
    remove()
    assert stock_is_back()


def test_the_shim_goes_first_then_ours(checkpoint: Path, alone: dict[str, mx.array]):
    vllm_moe_compat.apply()
    remove = shim.install()
    remove()
    assert same_bits(parameters(load(checkpoint)), alone)
    vllm_moe_compat.revert()
    assert stock_is_back()


def test_applied_again_under_the_shim_ours_is_there_once(checkpoint: Path, alone):
    vllm_moe_compat.apply()
    remove = shim.install()
    top = qwen3_5_moe.Model.sanitize
    vllm_moe_compat.revert()
    vllm_moe_compat.apply()
    assert qwen3_5_moe.Model.sanitize is top
    remove()
    assert same_bits(parameters(load(checkpoint)), alone)
    vllm_moe_compat.revert()
    assert stock_is_back()


def test_reverted_twice_under_the_shim_then_out_of_it(checkpoint: Path):
    vllm_moe_compat.apply()
    remove = shim.install()
    vllm_moe_compat.revert()
    vllm_moe_compat.revert()
    remove()
    vllm_moe_compat.apply()
    vllm_moe_compat.revert()
    assert stock_is_back()


def test_a_shim_that_takes_ours_out_with_it_is_made_good_at_the_next_load(
    checkpoint: Path, alone: dict[str, mx.array]
):
    remove = shim.install()
    vllm_moe_compat.apply()
    remove()
    assert stock_is_back()
    shimmed = ("mlx_lm.models.qwen3_5", "mlx_lm.models.qwen3_5_moe")
    rows = {row.module: row.state for row in vllm_moe_compat.status().rows}
    assert {rows[module] for module in shimmed} == {"displaced"}
    assert same_bits(parameters(load(checkpoint)), alone)
    assert "patched" in {row.state for row in vllm_moe_compat.status().rows}
    vllm_moe_compat.revert()
    assert stock_is_back()


def test_another_librarys_loader_gets_mlxs_own_form_back(checkpoint: Path, alone):
    """One that reads GGUF, say, and calls ``sanitize`` without ``load_config``."""
    with vllm_moe_compat.applied():
        model = load(checkpoint)
        found = model.sanitize(dict(alone))
    assert all(found[name] is array for name, array in alone.items())
