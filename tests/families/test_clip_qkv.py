"""OLMoE's queries, keys and values are clipped, which mlx-lm's module leaves out."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

import vllm_moe_compat
from support.oracle import Oracle, distance

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
TOKENS = [(7 * i * i + 3 * i + 1) % 64 for i in range(24)]


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")


def logits(folder: Path) -> np.ndarray:
    with vllm_moe_compat.applied():
        model = mlx_lm.utils.load_model(folder)[0]
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


def test_queries_keys_and_values_are_clipped(tmp_path: Path):
    clipped, free = (
        Oracle(tmp_path / name, "olmoe", clip_qkv=limit)
        for name, limit in (("clipped", 0.05), ("free", None))
    )
    assert distance(free.logits(TOKENS), clipped.logits(TOKENS)) > 1e-2
    for oracle in (clipped, free):
        assert distance(logits(oracle.folder), oracle.logits(TOKENS)) < 1e-5


def test_quantised_values_are_clipped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    oracle = Oracle(tmp_path, "olmoe", clip_qkv=0.05)
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "8bit")
    assert distance(logits(oracle.folder), oracle.logits(TOKENS)) < 0.05
