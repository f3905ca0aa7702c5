"""Compiled decode passes: the same bits, or given up by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support import compiled, hybrid, models
from vllm_moe_compat.backend.model import kernels
from vllm_moe_compat.backend.step import compiled_decode
from vllm_moe_compat.backend.step.forward import Forward

STEPS = 24


@pytest.fixture(autouse=True)
def _compile_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_decode, "PASSES_BEFORE_COMPILING", 2)
    monkeypatch.setattr(compiled_decode, "USES_PER_TRACE", 0)


class Run:
    """Prompts of these lengths and the logits of every step after them."""

    def __init__(
        self, served: Any, lengths: Sequence[int], *, compiles: bool, greedy: bool
    ) -> None:
        stateful = hasattr(served, "language_model") and served.model_type == "qwen3_5_moe"
        storage = (hybrid.storage if stateful else hybrid.softmax_storage)(served, 1 << 20)
        rows = (
            hybrid.requests(list(lengths))
            if stateful
            else hybrid.softmax_requests(storage, list(lengths))
        )
        self.forward = Forward(served, storage, compiles=compiles)
        self.compiled = self.forward.compiled
        hybrid.prefill(self.forward, rows)
        logits = [np.array(hybrid.decode(self.forward, rows, greedy=greedy)) for _ in range(STEPS)]
        self.failure = self.compiled.failure
        self.forward.close()
        self.logits, self.tokens = np.stack(logits), [row.output for row in rows]


def same_bits(one: Run, other: Run) -> bool:
    return bool((one.logits.view(np.uint32) == other.logits.view(np.uint32)).all())


@compiled.same_bits
def test_no_weights_are_held_after_the_end() -> None:
    served = hybrid.model()
    weights = sum(array.nbytes for _, array in tree_flatten(served.parameters()))
    run = Run(served, (40,), compiles=True, greedy=True)
    assert run.compiled.passes > STEPS // 2
    mx.clear_cache()
    before = mx.get_active_memory()
    for module in served.modules():
        for name in [name for name, value in module.items() if isinstance(value, mx.array)]:
            del module[name]
    assert before - mx.get_active_memory() >= weights


@compiled.same_bits
@pytest.mark.parametrize("greedy", [True, False], ids=["next pass built early", "one by one"])
@pytest.mark.parametrize("lengths", [(40,), (40, 17, 31, 5)], ids=["one row", "ragged rows"])
def test_compiled_passes_have_the_same_bits(lengths: tuple[int, ...], greedy: bool) -> None:
    served = hybrid.model()
    plain = Run(served, lengths, compiles=False, greedy=greedy)
    found = Run(served, lengths, compiles=True, greedy=greedy)
    assert plain.compiled.passes == 0
    assert (found.failure, found.compiled.passes > STEPS // 2) == ("", True)
    assert same_bits(found, plain)


@compiled.same_bits
def test_windows_and_sinks_are_inputs_too() -> None:
    """The window of gpt-oss begins to hide tokens while the passes are compiled."""
    served, config = models.build_mlx("gpt_oss")
    lengths = (config["sliding_window"] - 8, 5)
    plain = Run(served, lengths, compiles=False, greedy=True)
    found = Run(served, lengths, compiles=True, greedy=True)
    assert (found.failure, found.compiled.passes > STEPS // 3) == ("", True)
    assert same_bits(found, plain)


@compiled.same_bits
def test_shapes_that_change_too_often_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some row begins a page every second token."""
    monkeypatch.setattr(compiled_decode, "USES_PER_TRACE", 6)
    served = hybrid.model()
    found = Run(served, range(2, hybrid.BLOCK + 2, 2), compiles=True, greedy=True)
    assert found.failure == ""
    assert max(found.compiled.traces.values()) == compiled_decode.FREE_TRACES


def test_nothing_is_traced_while_kernels_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A disk that fills up while serving costs speed and no answer."""
    served = hybrid.model()
    plain = Run(served, (40,), compiles=False, greedy=True)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(kernels, "kernel_folder", lambda: blocked / "cpu")
    found = Run(served, (40,), compiles=True, greedy=True)
    assert found.failure == f"{blocked / 'cpu'}: Not a directory"
    assert found.compiled.passes == 0
    assert same_bits(found, plain)


class Counting(nn.Module):
    """A decoder layer whose Python counts its calls."""

    def __init__(self, layer: Any, kept: str) -> None:
        super().__init__()
        self.layer, self.kept = layer, kept
        self.is_linear = layer.is_linear
        self._calls = [0]
        self.last = mx.zeros((1,))

    def __call__(self, x: mx.array, **rest: Any) -> mx.array:
        self._calls[0] += 1
        if self.kept == "an array":
            self.last = x.sum()
        scale = 1 + self._calls[0] if self.kept == "a number" else 1
        out: mx.array = self.layer(x, **rest) * scale
        if self.kept == "a choice":
            out = out if bool(out.sum() > 0) else -out
        return out


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ("a number", "other logits"),
        ("an array", "a pass changes Counting.last"),
        ("a choice", "eval"),
    ],
)
def test_what_changes_unseen_is_not_compiled(kept: str, reason: str) -> None:
    served = hybrid.model()
    layers = served.language_model.model.layers
    original = layers[1]

    def run(compiles: bool) -> Run:
        layers[1] = Counting(original, kept)
        return Run(served, (40, 17), compiles=compiles, greedy=True)

    plain, found = run(False), run(True)
    assert reason in found.failure
    assert found.compiled.passes <= 1
    if kept != "a number":  # The trial computes a pass twice, which such a model would notice.
        assert same_bits(found, plain)


def test_layers_that_read_their_pages_are_not_compiled() -> None:
    served, _ = models.build_mlx("deepseek_v3")
    found = Run(served, (9, 4), compiles=True, greedy=True)
    assert found.failure == "attention is not computed on the pool"
