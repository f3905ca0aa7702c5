"""Reported memory equals allocated memory, and no stale page is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import models, schedules
from support.engine import Greedy, engine_core, in_process_llm, worker
from vllm_moe_compat.backend.vllm import kv_specs

pytestmark = pytest.mark.serve


def pools(llm: Any) -> list[Any]:
    return list(worker(llm).runner.storage.distinct_pools)


@pytest.mark.parametrize("size", [8 << 20, 50 << 20])
def test_kv_cache_memory_bytes_are_what_is_allocated(demo_path: Path, size: int) -> None:
    with in_process_llm(demo_path, kv_cache_memory_bytes=size) as llm:
        held = sum(pool.nbytes for pool in pools(llm))
        page = held / pools(llm)[0].num_blocks
        assert size - page < held <= size


def test_more_than_the_machine_has_is_refused_with_the_numbers(demo_path: Path) -> None:
    asked = 1 << 50
    with (
        pytest.raises(ValueError, match=r"--kv-cache-memory-bytes asks for 1073741824.0 MiB"),
        in_process_llm(demo_path, kv_cache_memory_bytes=asked),
    ):
        pass


def test_all_groups_share_one_buffer(demo_path: Path) -> None:
    """Three gated-delta groups and a softmax group of one layer each: one pool."""
    with in_process_llm(demo_path) as llm:
        config = engine_core(llm).scheduler.kv_cache_config
        assert len(config.kv_cache_groups) == 4
        assert len(pools(llm)) == 1


def test_utilization_bounds_everything_that_is_held(demo_path: Path) -> None:
    from vllm_moe_compat.load.memory import device_memory

    total, _ = device_memory()
    settings = {"kv_cache_memory_bytes": None, "max_num_seqs": 256, "max_model_len": 4096}
    with in_process_llm(demo_path, gpu_memory_utilization=0.04, **settings) as llm:
        budget = worker(llm).budget
        held = sum(pool.nbytes for pool in pools(llm))
        assert held <= budget.page_bytes
        assert held + budget.states + budget.activations + budget.weights <= 0.04 * total
        assert "gpu-memory-utilization" in str(budget)


@pytest.mark.parametrize(
    "kind",
    [
        *("demo", "gemma4_text"),
        *(pytest.param(x, marks=pytest.mark.full) for x in ("gpt_oss", "deepseek_v3", "jamba")),
    ],
)
def test_no_more_is_taken_than_the_sequences_can_use(
    kind: str, demo_path: Path, tmp_path: Path
) -> None:
    path = demo_path if kind == "demo" else models.write_mlx(tmp_path / "model", kind)
    settings = {"max_num_seqs": 2, "max_model_len": 256, "max_num_batched_tokens": 64}
    with in_process_llm(
        path, kv_cache_memory_bytes=None, skip_tokenizer_init=True, **settings
    ) as llm:
        budget = worker(llm).budget
        assert "can use" in budget.reason
        held = sum(pool.nbytes for pool in pools(llm))
        assert held < 8 << 20
        assert held <= budget.page_bytes
        # As many blocks as two sequences of the longest length, and vLLM's null block.
        config = engine_core(llm).scheduler.kv_cache_config
        need = kv_specs.demand(engine_core(llm).vllm_config, worker(llm).served.layers)
        assert config.num_blocks == 2 * need.blocks + 1
        arrivals = schedules.make(1, worker(llm).cache_config.block_size, longest=200)
        assert schedules.play(llm, arrivals).preemptions == 0


def test_sequences_are_lowered_when_their_states_do_not_fit(demo_path: Path) -> None:
    settings = {"kv_cache_memory_bytes": None, "max_num_batched_tokens": 2000}
    with in_process_llm(
        demo_path, gpu_memory_utilization=0.02, max_num_seqs=2000, **settings
    ) as llm:
        lowered = worker(llm).budget.sequences
        assert 1 <= lowered < 2000
        assert engine_core(llm).vllm_config.scheduler_config.max_num_seqs == lowered
        assert llm.generate(["Beautiful"] * 40, use_tqdm=False)[39].outputs[0].text


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("demo", True),
        pytest.param("demo", False, marks=pytest.mark.full),
        *(pytest.param(x, True, marks=pytest.mark.full) for x in ("gpt_oss", "deepseek_v3")),
    ],
)
def test_poisoned_pages_are_never_read(
    kind: str, prefix: bool, demo_path: Path, tmp_path: Path, greedy: Greedy
) -> None:
    """Fill every unwritten page with NaN: no token may change."""
    import mlx.core as mx

    path = demo_path
    if kind != "demo":
        path = models.write_mlx(tmp_path / "model", kind)
        greedy = Greedy(path)
    settings = {"enable_prefix_caching": prefix, "max_num_batched_tokens": 100}
    with in_process_llm(path, skip_tokenizer_init=True, **settings) as llm:
        for pool in pools(llm):
            poison = mx.full(pool.pages.shape, 0x7FC00001, dtype=mx.uint32)
            poison[0] = 0  # vLLM's null block
            pool.pages = poison
            mx.eval(pool.pages)
            assert mx.isnan(pool.pages[1].view(mx.float32)).all().item()
        for seed in (11, 12):
            arrivals = schedules.make(seed, worker(llm).cache_config.block_size)
            played = schedules.play(llm, arrivals)
            for arrival in arrivals:
                if arrival.req_id in played.tokens:
                    want = greedy.tokens(arrival.prompt, arrival.max_tokens)
                    assert played.tokens[arrival.req_id] == want
        for pool in pools(llm):
            assert not pool.pages[0].any().item(), "the null block stays zero"
