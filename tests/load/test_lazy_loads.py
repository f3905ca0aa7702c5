"""Lazy loads read nothing, evaluate to the same bits, and are judged by what is kept."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
import torch
import transformers

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME
from parity.forms import build as build_form
from support.checkpoints import Fp8, Sizes, build
from support.loading import load, parameters, same_bits
from vllm_moe_compat.errors import InsufficientMemoryError
from vllm_moe_compat.load import memory
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.load.report import last_report

LARGE = Sizes(hidden=256, intermediate=256, experts=8)


@pytest.fixture(autouse=True)
def _applied() -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with vllm_moe_compat.applied():
        yield


def lazily(path: Path, **arguments: Any) -> tuple[Any, int]:
    """Return the model, and the bytes that the load left in memory."""
    mx.synchronize()
    before = mx.get_active_memory()
    model, _ = mlx_lm.utils.load_model(path, lazy=True, **arguments)
    return model, mx.get_active_memory() - before


def size(arrays: Any) -> int:
    return sum(array.nbytes for array in arrays)


FORMS = ("block FP8 128", "block FP8 combined", "per-expert", "ModelOpt NVFP4", "GPTQ", "AWQ")
MORE = ("combined transposed", "per-channel FP8", "int4", "MXFP4", "GPTQ act-order", "MLX form")


@pytest.mark.parametrize(
    "form", [*FORMS, *(pytest.param(form, marks=pytest.mark.full) for form in MORE)]
)
def test_a_lazy_load_gives_the_same_bits(form: str, tmp_path: Path):
    path = build_form(FAMILIES["qwen3_5_moe"], FORM_BY_NAME[form]).write(tmp_path)
    wanted = parameters(load(path))
    found, _ = lazily(path)
    assert same_bits(parameters(found), wanted)


DAILY = [("per-expert", None, "none"), ("per-expert", Fp8(), "none"), ("combined", Fp8(), "8bit")]
REST = [
    (form, fp8, setting)
    for form in ("per-expert", "combined")
    for fp8 in (None, Fp8())
    for setting in ("none", "8bit")
    if (form, fp8, setting) not in DAILY
]


@pytest.mark.parametrize(
    ("form", "fp8", "setting"), [*DAILY, *(pytest.param(*r, marks=pytest.mark.full) for r in REST)]
)
def test_a_stage_reads_its_own_layers(
    form: str, fp8: Fp8 | None, setting: str, tmp_path: Path, monkeypatch
):
    """As a pipeline stage does: load lazily, keep a range of layers, evaluate that."""
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", setting)
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
    path = build(form, fp8, sizes=LARGE).write(tmp_path)
    wanted = parameters(load(path))
    model, left = lazily(path)
    own = {
        name: array
        for name, array in parameters(model).items()
        if ".layers.2." in name or ".layers.3." in name
    }
    total = size(wanted.values())
    assert left < total / 50
    before = mx.get_active_memory()
    mx.eval(own)
    assert mx.get_active_memory() - before < size(own.values()) + total / 50
    assert same_bits(own, {name: wanted[name] for name in own})


def test_a_lazy_load_is_not_refused_for_its_total(tmp_path: Path, monkeypatch, caplog):
    path = build(fp8=Fp8()).write(tmp_path)
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    monkeypatch.setattr(memory, "device_memory", lambda: (1000, 1000))
    with pytest.raises(InsufficientMemoryError):
        load(path)
    model, _ = lazily(path)
    assert parameters(model)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with loading_with(at_once=True), pytest.raises(InsufficientMemoryError):
        lazily(path)


def test_the_report_of_a_lazy_load_claims_no_reading(tmp_path: Path):
    lazily(build(fp8=Fp8()).write(tmp_path))
    assert "when they are first used" in str(last_report())


def test_who_needs_all_tensors_gets_them_at_once(tmp_path: Path):
    """The embedded backend, whose loader evaluates tensor by tensor on the faster path."""
    path = build(fp8=Fp8(), sizes=LARGE).write(tmp_path)
    with loading_with(at_once=True):
        model, left = lazily(path)
    experts = [a for n, a in parameters(model).items() if ".switch_mlp." in n]
    assert left >= size(experts)


def test_mlx_lm_is_lazy_and_strict_by_the_arguments_that_are_looked_at():
    taken = inspect.signature(mlx_lm.utils.load_model).parameters
    assert taken["lazy"].default is False
    assert taken["strict"].default is True
