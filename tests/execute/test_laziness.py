"""Graphs of builds: nothing is read before they are used, and an evaluation stays bounded."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from vllm_moe_compat.checkpoint.numbers.fp8_ops import DequantizeFp8
from vllm_moe_compat.execute import stack
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.execute.laziness import building
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.ops import StackExperts

EXPERTS, ROWS = 8, 128


def write(path: Path, layers: int) -> Path:
    values = np.random.default_rng(0).integers(0, 120, (EXPERTS, ROWS, ROWS), dtype=np.uint8)
    experts = [mx.array(value) for value in values]
    tensors: dict[str, mx.array] = {}
    for layer in range(layers):
        for expert in range(EXPERTS):
            tensors[f"{layer}.{expert}.w"] = experts[expert]
            tensors[f"{layer}.{expert}.s"] = mx.array([[1.0 / (layer + expert + 1)]])
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    return path / "model.safetensors"


def built(file: Path, layers: int, *, lazily: bool) -> dict[str, mx.array]:
    weights = mx.load(str(file))
    made: dict[str, mx.array] = {}
    with building(lazily=lazily):
        for layer in range(layers):
            names = [f"{layer}.{expert}" for expert in range(EXPERTS)]
            build = Build(
                f"{layer}.out",
                tuple(f"{name}.w" for name in names),
                (("scale", tuple(f"{name}.s" for name in names)),),
                (StackExperts(EXPERTS), DequantizeFp8((ROWS, ROWS))),
            )
            made |= make_build(build, weights, "bfloat16")
    return made


def test_evaluating_many_builds_at_once_takes_their_bytes_and_a_constant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As ``mx.eval(model.parameters())`` of a pipeline stage."""
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 4 * 2 * ROWS * ROWS)
    beside: list[int] = []
    for layers in (40, 120):
        file = write(tmp_path, layers)
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        made = built(file, layers, lazily=True)
        assert mx.get_active_memory() - before < ROWS * ROWS
        mx.reset_peak_memory()
        mx.eval(made)
        held = sum(array.nbytes for array in made.values())
        assert abs(mx.get_active_memory() - before - held) < ROWS * ROWS
        beside.append(mx.get_peak_memory() - before - held)
        assert all(
            mx.array_equal(made[name], array).item()
            for name, array in built(file, layers, lazily=False).items()
        )
        del made
    small, large = beside
    assert large < 2 * small
    assert large < held / 4
