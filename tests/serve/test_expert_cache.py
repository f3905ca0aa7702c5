"""With a share of the experts in memory, every pass gives the bits of the resident model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from serve.test_module_paths import LENGTHS, SETTINGS, generate
from serve.test_schedules import SETTINGS as SCHEDULES
from support import models, schedules
from support.engine import in_process_llm, worker
from vllm_moe_compat.expert_cache.counters import counters
from vllm_moe_compat.expert_cache.install import containers

pytestmark = [
    pytest.mark.serve,
    pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch"),
]

CACHE = "VLLM_MOE_COMPAT_EXPERT_CACHE"
# Of 16 experts, of which a token needs 2.
SHARES = ["50%", "25%", "12.5%"]
DAILY = ["12.5%"]
# Three of these small requests at a time never starve.
NAMES = [name for name in SCHEDULES if name != "starved"]


@contextmanager
def engine(
    path: Path, cache: str, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[tuple[Any, list[bytes]]]:
    """An engine with a cache, and the logits of its decode passes as they come."""
    monkeypatch.setenv(CACHE, cache)
    with in_process_llm(path, **settings) as llm:
        forward, seen = worker(llm).runner.forward, []
        decode = forward.decode

        def noting(work: Any, draw: Any, *, build_next: bool) -> tuple[mx.array, Any]:
            logits, tokens = decode(work, draw, build_next=build_next)
            forward.wait()
            seen.append(np.array(logits.astype(mx.float32)).tobytes())
            return logits, tokens

        monkeypatch.setattr(forward, "decode", noting)
        yield llm, seen
        cached = containers(worker(llm).served.model)
        assert bool(cached) == (cache != "off")
        assert forward.expert_reads.may_miss() == any(not one.resident for one in cached)


@pytest.fixture(scope="module")
def checkpoint(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "model"
    return models.write(path, "qwen3_moe of 16 experts", demo_path, dtype="float32")


def played(llm: Any, seeds: int) -> list[schedules.Played]:
    block = worker(llm).cache_config.block_size
    return [
        schedules.play(llm, schedules.make(seed, block, requests=7, longest=160, output=40))
        for seed in range(seeds)
    ]


def full_but(names: Any, daily: set[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in daily else pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", full_but(NAMES, {"async-starved-prefix"}))
def test_a_schedule_gives_the_bits_of_the_resident_model(
    name: str,
    checkpoint: Path,
    schedule_budget: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunked prefills, preemptions, prefix hits and aborts, in every batch that comes."""
    settings = SCHEDULES[name] | {"block_size": 16, "max_model_len": 240}
    if "starved" in name:
        settings |= {"num_gpu_blocks_override": 20}
    seeds = max(1, schedule_budget // 2)
    with engine(checkpoint, "off", monkeypatch, **settings) as (llm, wanted):
        resident = played(llm, seeds)
    assert any(one.preemptions for one in resident) == ("starved" in name)
    assert any(one.cached for one in resident) == ("prefix" in name)
    for share in SHARES if request.config.getoption("--full") else DAILY:
        before = counters()
        with engine(checkpoint, share, monkeypatch, **settings) as (llm, seen):
            assert played(llm, seeds) == resident, share
        assert seen == wanted, share
        counted = counters() - before
        assert counted.misses > 0
        assert counted.groups > counted.passes


def prompts(vocabulary: int) -> list[list[int]]:
    draw = np.random.default_rng(3)
    return [draw.integers(5, vocabulary, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize(
    ("form", "dtype", "quantize"),
    [
        ("block FP8", "float32", "none"),
        pytest.param("saved", "bfloat16", "none"),
        pytest.param("int4", "float32", "none", marks=pytest.mark.full),
        pytest.param("int4", "bfloat16", "none", marks=pytest.mark.full),
        pytest.param("NVFP4", "bfloat16", "none", marks=pytest.mark.full),
        pytest.param("MXFP4", "float32", "none", marks=pytest.mark.full),
        pytest.param("block FP8", "bfloat16", "none", marks=pytest.mark.full),
        pytest.param("block FP8", "float32", "4bit", marks=pytest.mark.full),
        pytest.param("block FP8", "bfloat16", "8bit", marks=pytest.mark.full),
    ],
)
def test_forms(
    form: str, dtype: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them float32 experts that are served, and so rounded, in bfloat16."""
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", quantize)
    path = build(FAMILIES["qwen3_moe"], FORM_BY_NAME[form]).write(tmp_path)
    compare(path, dtype, 96, monkeypatch)


@pytest.mark.full
def test_a_folder_in_mlx_form(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.write_mlx_4bit(tmp_path / "4bit", checkpoint)
    compare(path, "bfloat16", 500, monkeypatch)


def compare(path: Path, dtype: str, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cache in ("off", "50%"):
        with engine(path, cache, monkeypatch, dtype=dtype, **SETTINGS) as (llm, seen):
            found.append((generate(llm, prompts(vocabulary)), seen))
            held = sum(one.nbytes for one in containers(worker(llm).served.model))
            weights = worker(llm).served.weight_bytes
        assert worker_weights(cache, held, weights)
    assert found[0] == found[1]


def worker_weights(cache: str, held: int, weights: int) -> bool:
    """Whether the weights that the budget counts include the slots."""
    return held == 0 if cache == "off" else 0 < held < weights
