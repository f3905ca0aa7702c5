"""Passes of a model whose experts are read as they are chosen are those of the resident model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from support import compiled, hybrid, models
from support.memory_experts import MemorySource, cache_experts
from vllm_moe_compat.backend.model.activations import measure
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.model.dry_run import dry_run
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step import compiled_decode, self_check
from vllm_moe_compat.backend.step.batch import Request, make_pass
from vllm_moe_compat.backend.step.forward import Forward
from vllm_moe_compat.errors import CheckpointFileError

POOL_BYTES = 1 << 20
LENGTHS = [40, 17, 33, 5]


def hybrid_parts(pool_bytes: int = POOL_BYTES) -> tuple[Any, LayerStorage, list[Request]]:
    served = hybrid.model()
    return served, hybrid.storage(served, pool_bytes), hybrid.requests(LENGTHS)


def softmax_parts(
    name: str, pool_bytes: int = POOL_BYTES
) -> tuple[Any, LayerStorage, list[Request]]:
    served, _ = models.build_mlx(name)
    storage = hybrid.softmax_storage(served, pool_bytes)
    storage.layers = dry_run(served, storage.layers).layers
    return served, storage, hybrid.softmax_requests(storage, LENGTHS)


def run(forward: Forward, rows: list[Request], count: int = 6) -> list[Any]:
    """Logits of ``count`` decode passes behind the prompts, as bytes."""
    hybrid.prefill(forward, rows)
    return [np.array(hybrid.decode(forward, rows, greedy=True)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["hybrid", "gpt_oss", "deepseek_v3", "llama4"])
@pytest.mark.parametrize("slots", [3, 1])
def test_logits_are_those_of_the_resident_model(kind: str, slots: int) -> None:
    """Windows and sinks, latents, and code for one sequence at a time, beside states."""
    logits = []
    for cached in (False, True):
        parts = hybrid_parts() if kind == "hybrid" else softmax_parts(kind)
        served, storage, rows = parts
        if cached:
            cache_experts(served, slots)
        forward = Forward(served, storage)
        logits.append(run(forward, rows))
        assert forward.expert_reads.may_miss() == cached
        assert (forward.hits > 0) == (not cached and kind != "llama4")
    for one, other in zip(*logits, strict=True):
        assert one.tobytes() == other.tobytes()


@compiled.same_bits
@pytest.mark.parametrize("slots", [2, 4], ids=["half of the experts", "all of them"])
def test_passes_are_built_early_and_compiled_once_all_experts_are_there(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_decode, "PASSES_BEFORE_COMPILING", 2)
    served, storage, rows = hybrid_parts()
    cache_experts(served, slots)
    forward = Forward(served, storage, compiles=True)
    run(forward, rows, 12)
    assert (forward.hits > 0) == (forward.compiled.passes > 0) == (slots == 4)


def test_no_pass_copies_a_pool() -> None:
    size = 64 << 20

    def growth(step: Callable[[], Any]) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step()
        return int(mx.get_peak_memory()) - int(before)

    for parts in (hybrid_parts(size), softmax_parts("gpt_oss", size)):
        served, storage, rows = parts
        cache_experts(served, 2)
        forward = Forward(served, storage)
        assert growth(lambda f=forward, r=rows: hybrid.prefill(f, r)) < size // 16
        assert growth(lambda f=forward, r=rows: run_decodes(f, r)) < size // 16
        # Chunks read pages that the pass before wrote.
        chunks = make_pass([(row, 4, len(row.prompt) - 5) for row in rows if len(row.prompt) > 5])
        assert growth(lambda f=forward, c=chunks: f(c, [])) < size // 16


def run_decodes(forward: Forward, rows: list[Request]) -> None:
    for _ in range(5):
        hybrid.decode(forward, rows, greedy=True)


class Recorder(nn.Module):
    """Notes the experts that a resident container is asked for."""

    def __init__(self, container: nn.Module) -> None:
        super().__init__()
        self.container = container
        self.asked: list[Any] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.asked.append(indices)
        return self.container(x, indices)


def replace_last(served: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put another module in the place of the last layer's experts."""
    modules = dict(served.named_modules())
    path = [path for path, module in modules.items() if isinstance(module, SwitchGLU)][-1]
    owner, _, name = path.rpartition(".")
    modules[owner][name] = made = make(modules[path])
    return made


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4"], ids=["together", "one by one"])
def test_an_expert_that_cannot_be_read_fails_the_rows_that_need_it(kind: str) -> None:
    served, storage, rows = softmax_parts(kind)
    recorder = replace_last(served, Recorder)
    forward = Forward(served, storage)
    hybrid.prefill(forward, rows)
    recorder.asked = []
    logits = np.array(hybrid.decode(forward, rows))
    chosen = np.concatenate([np.array(x).reshape(-1, x.shape[-1]) for x in recorder.asked])
    broken = int(chosen[1, 0])
    need = {row for row, choice in enumerate(chosen) if broken in choice}
    assert 0 < len(need) < len(rows)

    served, storage, rows = softmax_parts(kind)
    sources = cache_experts(served, 2)
    forward = Forward(served, storage)
    hybrid.prefill(forward, rows)
    assert not forward.failed_rows
    last = list(sources.values())[-1]
    # Out of the slots first: what is there needs not be read.
    forget_everything(served)
    last.broken = {broken}
    with_faults = np.array(hybrid.decode(forward, rows))
    assert forward.failed_rows.keys() == need
    assert all("torn" in str(error) for error in forward.failed_rows.values())
    for row in set(range(len(rows))) - need:
        assert with_faults[row].tobytes() == logits[row].tobytes()

    # Nothing is read for requests that have failed.
    for row in need:
        rows[row].failed = True
    for source in sources.values():
        source.asked = []
    hybrid.decode(forward, [rows[row] for row in need])
    assert not forward.failed_rows
    assert not any(source.asked for source in sources.values())


def forget_everything(served: nn.Module) -> None:
    from vllm_moe_compat.expert_cache.cached_experts import CachedExperts

    for module in served.modules():
        if isinstance(module, CachedExperts):
            for expert in range(module.experts):
                module._policy.forget(expert)


def test_graphs_that_are_only_built_read_nothing() -> None:
    served, _ = models.build_mlx("qwen3_moe")
    sources = cache_experts(served, 2)
    dry_run(served, describe(served))
    assert not any(source.asked for source in sources.values())


def test_the_check_at_the_start_names_an_expert_that_cannot_be_read() -> None:
    served, storage, _ = softmax_parts("qwen3_moe")
    sources = cache_experts(served, 2)
    forward = Forward(served, storage)
    self_check.run(forward)
    forget_everything(served)
    everyone: MemorySource = list(sources.values())[-1]
    everyone.broken = set(range(everyone.experts))
    with pytest.raises(CheckpointFileError, match="torn"):
        self_check.run(forward)


def test_activations_are_measured_as_a_pass_runs() -> None:
    """By groups of experts, which take what the groups take."""
    peaks = {}
    for slots in (8, 2):
        served, _ = models.build_mlx("qwen3_moe")
        layers = describe(served)
        cache_experts(served, slots)
        peaks[slots] = measure(served, layers, tokens=256, longest=256)
    assert 0 < peaks[2] < 2 * peaks[8]
