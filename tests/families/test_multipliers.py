"""Falcon-H1's keys are multiplied, which mlx-lm's module leaves out."""

from __future__ import annotations

import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from settings.trial import AGREES, Bench, distance

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


def test_keys_are_multiplied(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    bench = Bench(FAMILIES["falcon_h1"])
    file = bench.changed([(("key_multiplier",), 0.390625)])
    model, wanted = bench.reference(file)
    with vllm_moe_compat.applied():
        assert distance(bench.ours(model, file), wanted) < AGREES
