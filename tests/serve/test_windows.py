"""Windows that mlx-lm's modules ignore, on the backend's pages: tokens and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import schedules
from support.cells import one_in
from support.engine import Greedy, engine_core, in_process_llm, worker
from support.oracle import Oracle

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore:::transformers")]

WINDOW = 24  # more than a page, and no multiple of one
ON = {"sliding_window": WINDOW, "use_sliding_window": True, "vocab_size": 512}
S, F = "sliding_attention", "full_attention"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", ON),
    "mixtral": ("mixtral", ON),
    "qwen2": ("qwen2", ON | {"num_hidden_layers": 3, "max_window_layers": 1}),
    "qwen3_moe": ("qwen3_moe", ON),
    "gemma2": ("gemma2", ON),
    "cohere2 pruned": ("cohere2", ON | {"num_hidden_layers": 4, "layer_types": [F, S, S, F]}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "chunks": {"max_num_batched_tokens": 32},
    "prefix": {"max_num_batched_tokens": 48, "enable_prefix_caching": True},
    "starved": {"num_gpu_blocks_override": 36, "max_num_seqs": 4, "enable_prefix_caching": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", one_in(2, FAMILIES))
def test_any_schedule_gives_transformers_tokens(name: str, setting: str, tmp_path: Path) -> None:
    family, settings = FAMILIES[name]
    oracle = Oracle(tmp_path, family, **settings)
    arrivals = schedules.make(seed=4, block=16, requests=10, longest=110, output=30)
    options = {"max_model_len": 160, "skip_tokenizer_init": True} | SETTINGS[setting]
    with in_process_llm(tmp_path, **options) as llm:
        played = schedules.play(llm, arrivals)
        assert {layer.window for layer in worker(llm).served.layers} >= {WINDOW}
    greedy = Greedy(tmp_path)
    assert played.tokens
    for arrival in arrivals:
        if (found := played.tokens.get(arrival.req_id)) is None:
            continue
        assert found == greedy.tokens(arrival.prompt, len(found))
        best = oracle.logits([*arrival.prompt, *found]).argmax(-1)
        np.testing.assert_array_equal(best[len(arrival.prompt) - 1 : -1], found)
    assert any(len(a.prompt) > 2 * WINDOW and a.req_id in played.tokens for a in arrivals)
    assert played.cached or setting == "chunks"


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_pages_behind_the_window_are_given_back(name: str, tmp_path: Path) -> None:
    """vLLM keeps the model's whole length, and a long sequence fits few pages."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    family, settings = FAMILIES[name]
    Oracle(tmp_path, family, **settings)
    with in_process_llm(tmp_path, max_model_len=None, skip_tokenizer_init=True) as llm:
        assert llm.llm_engine.model_config.max_model_len == 512
        groups = engine_core(llm).scheduler.kv_cache_config.kv_cache_groups
        specs = [group.kv_cache_spec for group in groups]
        windowed = [spec for spec in specs if isinstance(spec, SlidingWindowSpec)]
        assert {spec.sliding_window for spec in windowed} == {WINDOW}
        full = [spec for spec in specs if type(spec) is FullAttentionSpec]
        assert bool(full) == (name == "qwen2")
        engine, pool = llm.llm_engine, engine_core(llm).scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
        engine.add_request("long", TokensPrompt(prompt_token_ids=list(range(5, 25))), params)
        held = 0
        while engine.has_unfinished_requests():
            engine.step()
            held = max(held, free - pool.get_num_free_blocks())
        pages = -(-220 // 16)
        assert held <= len(windowed) * 3 + len(full) * pages
