"""Experts on disk under vllm-metal's loader: beside its wrapper, and what it looks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import qwen3_5, qwen3_5_moe

import vllm_moe_compat
from support import shim, vllm_metal
from support.checkpoints import Fp8, Sizes, build
from support.loading import TOKENS, load
from vllm_moe_compat.expert_cache.install import containers
from vllm_moe_compat.load.report import last_report

CACHE = "VLLM_MOE_COMPAT_EXPERT_CACHE"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    vllm_moe_compat.revert()
    stock = {cls: cls.__dict__["sanitize"] for cls in (qwen3_5.Model, qwen3_5_moe.Model)}
    yield
    for cls, original in stock.items():
        cls.sanitize = original
    vllm_moe_compat.revert()


@pytest.mark.parametrize(
    "order", [(shim.install, vllm_moe_compat.apply), (vllm_moe_compat.apply, shim.install)]
)
def test_beside_the_wrapper_it_is_the_resident_model(
    order: tuple[Callable[[], Any], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(fp8=Fp8(), sizes=Sizes(hidden=192, intermediate=200)).write(tmp_path)
    for install in order:
        install()
    whole = load(path)
    monkeypatch.setenv(CACHE, "50%")
    model = load(path)
    report = last_report()
    assert report is not None
    assert report.expert_cache is not None
    assert containers(model)
    assert mx.array_equal(model(mx.array([TOKENS])), whole(mx.array([TOKENS]))).item()
    assert vllm_metal.unmet(model) == vllm_metal.unmet(whole)
