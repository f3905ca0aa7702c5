"""Under any schedule, several ranks have mlx-lm's single-sequence tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import models, schedules
from support.engine import Greedy, engine_core, in_process_llm
from vllm_moe_compat.backend.vllm.executor import settled

pytestmark = [pytest.mark.serve, pytest.mark.full, pytest.mark.timeout(3600)]

# Preemptions, prefixes, chunks and async scheduling at once.
TIGHT: dict[str, Any] = {
    "max_model_len": 432,
    "max_num_batched_tokens": 64,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": True,
    "async_scheduling": True,
}
# Model → ranks, and blocks with which the scheduler has to preempt.
KINDS = {
    "demo": (2, 34),
    "qwen3": (2, 30),
    "qwen3_moe": (4, 40),
    "mixtral": (2, 30),
    "deepseek_v3": (2, 30),
    "gpt_oss": (2, 46),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_a_single_sequence(
    kind: str, demo_path: Path, tmp_path: Path, schedule_budget: int
) -> None:
    if kind == "demo":
        path = demo_path
    elif kind in models.FAMILIES:
        path = models.write(tmp_path / "model", kind, demo_path, "float32")
    else:
        path = models.write_mlx(tmp_path / "model", kind)
    ranks, blocks = KINDS[kind]
    greedy = Greedy(path)
    settings = TIGHT | {"tensor_parallel_size": ranks, "num_gpu_blocks_override": blocks}
    with in_process_llm(path, **settings) as llm:
        config = engine_core(llm).vllm_config
        assert llm.collective_rpc("settled_settings") == [settled(config)] * ranks
        block = config.cache_config.block_size
        preemptions = cached = 0
        for seed in range(schedule_budget):
            arrivals = schedules.make(seed, block, longest=200, output=90)
            played = schedules.play(llm, arrivals)
            preemptions, cached = preemptions + played.preemptions, cached + played.cached
            for arrival in arrivals:
                if arrival.req_id in played.tokens:
                    want = greedy.tokens(arrival.prompt, arrival.max_tokens)
                    assert played.tokens[arrival.req_id] == want, (
                        f"{kind}: {arrival.req_id}\n{schedules.describe(seed, arrivals)}"
                    )
            pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert preemptions
        assert cached
