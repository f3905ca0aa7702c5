"""The memory of speculation, against the bytes that steps with drafts take."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from support import drafts
from support.engine import Greedy, in_process_llm, worker
from vllm_moe_compat import demo
from vllm_moe_compat.backend.pages.state_pool import StatePool
from vllm_moe_compat.backend.step.drafting import Always
from vllm_moe_compat.backend.vllm import draft_memory

pytestmark = pytest.mark.serve

MOST, REQUESTS = 7, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "ngram": drafts.speculating(MOST),
    "mtp": {"speculative_config": {"method": "mtp", "num_speculative_tokens": MOST}},
}


@pytest.mark.parametrize("method", ["mtp", pytest.param("ngram", marks=pytest.mark.full)])
def test_no_step_takes_more_than_was_estimated(
    demo_checkpoint: demo.DemoCheckpoint, method: str
) -> None:
    """So many sequences as may run at once, each with all of its drafts, most of them wrong."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    path = demo_checkpoint.path
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    with in_process_llm(
        path, max_num_batched_tokens=64, max_model_len=256, **SETTINGS[method]
    ) as llm:
        mine, engine = worker(llm), llm.llm_engine
        if method == "ngram":
            oracle = drafts.Oracle(Greedy(path).tokens, "none right")
            drafts.put_in(llm, oracle, MOST)
        else:
            mine.runner.drafting.lengths = Always(MOST)
        for number in range(REQUESTS):
            prompt = TokensPrompt(prompt_token_ids=list(range(20 + number, 28 + number)))
            engine.add_request(str(number), prompt, params)
        mx.clear_cache()
        before, peaks = mx.get_active_memory(), dict[int, int]()
        while engine.has_unfinished_requests():
            mx.clear_cache()
            mx.reset_peak_memory()
            engine.step()
            drafted = sum(len(request.drafts) for request in mine.runner.batch.requests.values())
            peak = int(mx.get_peak_memory()) - before
            peaks[drafted] = max(peaks.get(drafted, 0), peak)
        assert max(peaks) == REQUESTS * MOST
        budget, added = mine.budget, draft_memory.measure(mine.vllm_config, mine.served)
        assert budget.sequences == REQUESTS
        assert max(peaks.values()) <= budget.activations + budget.states
        # It takes what was added: without it the estimate would be too low.
        without = budget.activations - added.activations
        without += REQUESTS * StatePool.bytes_per_sequence(mine.runner.storage.states.layers)
        assert max(peaks.values()) > without
