"""Drafts of a checkpoint's own prediction heads: the same text in fewer steps.

They equal those of one pass over the whole sequence, however the engine cut it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from support import schedules
from support.drafts_of_heads import Proposals, accepted, speculating, write_with_heads
from support.engine import Greedy, engine_core, in_process_llm, worker
from vllm_moe_compat.backend.step import mtp
from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.drafting import Always

pytestmark = [pytest.mark.serve, pytest.mark.timeout(3600)]

MOST = 3
COUNT = 24


@pytest.fixture(autouse=True)
def _never_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is parked depends on the machine's load."""
    monkeypatch.setenv("VLLM_MOE_COMPAT_PARK_DRAFTS", "0")


@pytest.fixture(scope="module")
def text(demo_path: Path) -> list[int]:
    """Text like what the demo checkpoint was trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_path)
    return list(tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 40))


def ask(llm: Any, prompts: list[list[int]], count: int = COUNT) -> list[tuple[int, list[int]]]:
    """Return the number of cached tokens and the answer for each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, detokenize=False, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [
        (output.num_cached_tokens or 0, list(output.outputs[0].token_ids))
        for output in llm.generate(given, params, use_tqdm=False)
    ]


def test_text_is_that_of_no_drafts_and_most_of_them_are_right(
    demo_path: Path, greedy: Greedy, text: list[int]
) -> None:
    """Prompts of one chunk and of several, one after another and together, behind a prefix."""
    settings = {"enable_prefix_caching": True, "max_num_batched_tokens": 128}
    with in_process_llm(demo_path, **settings, **speculating(MOST), disable_log_stats=False) as llm:
        block = worker(llm).cache_config.block_size
        long = text[: 3 * block + 7]
        proposals = Proposals(llm)
        for prompts in ([long], [long, text[:30], text[5:8]], [[*long[: 2 * block + 9], 7, 8]]):
            answers = ask(llm, prompts)
            assert [answer for _, answer in answers] == [greedy.tokens(p, COUNT) for p in prompts]
            if len(prompts) > 1:
                # The block after the last one is computed anew: vLLM counts on it for heads.
                assert answers[0][0] == 2 * block
        proposals.check()
        right, all_of_them = accepted(llm)
        assert right > all_of_them / 2
        # All requests have ended, and the next step tells the worker.
        llm.llm_engine.step()
        ask(llm, [[5, 6]], 1)
        assert len(worker(llm).runner.drafting.follower._followed) <= 1


@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v3",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in (
                *("glm4_moe", "glm4_moe_lite", "qwen3_5", "qwen3_next", "ernie4_5_moe"),
                *("exaone_moe", "exaone_moe full", "mimo_v2_flash", "nemotron_h"),
            )
        ),
    ],
)
def test_heads_of_other_families(family: str, tmp_path: Path) -> None:
    path = write_with_heads(tmp_path / "model", family)
    greedy = Greedy(path)
    settings = {"dtype": "float32", "max_model_len": 160, "skip_tokenizer_init": True}
    prompts = [[(7 * i * i + s * i) % 90 + 3 for i in range(n)] for s, n in ((3, 20), (4, 70))]
    prompts += [[9], prompts[0][:5]]
    with in_process_llm(path, **settings, **speculating(MOST), max_num_batched_tokens=32) as llm:
        proposals = Proposals(llm)
        found = ask(llm, prompts)
        assert [answer for _, answer in found] == [greedy.tokens(p, COUNT) for p in prompts]
        proposals.check()


@pytest.mark.full
@pytest.mark.parametrize("cached", [False, True])
def test_requests_that_are_preempted(cached: bool, tmp_path: Path) -> None:
    """What their heads have seen is gone, or belongs to the prefix that they begin behind."""
    path = write_with_heads(tmp_path / "model", "deepseek_v3")
    greedy = Greedy(path)
    settings = {
        **{"dtype": "float32", "max_model_len": 160, "skip_tokenizer_init": True},
        **{"num_gpu_blocks_override": 14, "enable_prefix_caching": cached},
    }
    prompts = [[(7 * i * i + s * i) % 90 + 3 for i in range(40 + 9 * s)] for s in (1, 2, 3)]
    with in_process_llm(path, **settings, **speculating(MOST), disable_log_stats=False) as llm:
        proposals = Proposals(llm)
        found = ask(llm, prompts, 60)
        assert [answer for _, answer in found] == [greedy.tokens(p, 60) for p in prompts]
        proposals.check()
        (preemptions,) = (m for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        assert preemptions.value > 0


# Few blocks starve the scheduler into preemptions; few tokens per step cut prompts into chunks.
SETTINGS: dict[str, dict[str, Any]] = {
    "prefix-chunks": {"enable_prefix_caching": True, "max_num_batched_tokens": 90},
    "starved-prefix": {
        "num_gpu_blocks_override": 26,
        "max_model_len": 432,
        "enable_prefix_caching": True,
    },
}


@pytest.mark.full
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("name", SETTINGS)
def test_any_schedule(
    name: str, most: int, demo_path: Path, greedy: Greedy, schedule_budget: int
) -> None:
    """Requests join and leave; random prompts make most drafts wrong, repeated text right."""
    with in_process_llm(demo_path, **SETTINGS[name], **speculating(most)) as llm:
        block, preemptions, cached = worker(llm).cache_config.block_size, 0, 0
        proposals = Proposals(llm)
        for seed in range(schedule_budget):
            arrivals = schedules.make(seed, block, output=90 if "starved" in name else 24)
            played = schedules.play(llm, arrivals)
            preemptions += played.preemptions
            cached += played.cached
            for arrival in arrivals:
                if arrival.req_id in played.tokens:
                    want = greedy.tokens(arrival.prompt, arrival.max_tokens)
                    assert played.tokens[arrival.req_id] == want, (
                        f"{name}: {arrival.req_id} differs\n{schedules.describe(seed, arrivals)}"
                    )
            pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
            proposals.check()
            proposals.made.clear()
        assert preemptions > 0 or "starved" not in name
        # Where blocks are short, they go to running requests first.
        assert cached > 0 or name != "prefix-chunks"


class Pauses(Always):
    """Gives a request drafts for some tokens, then none for more tokens, and so on."""

    def __init__(self, most: int, drafts: int, pause: int) -> None:
        super().__init__(most)
        self.drafts, self.pause = drafts, pause

    def lengths(self, requests: Sequence[Request]) -> list[int]:
        turn = self.drafts + self.pause
        return [self.most * (len(r.output) % turn < self.drafts) for r in requests]


def test_drafts_begin_again_after_pauses_and_no_pool_is_copied(
    demo_path: Path, greedy: Greedy, text: list[int]
) -> None:
    """The heads' pages are in a pool that layers of the model use, too."""
    prompts = [text[:40], text[3:9]]
    with in_process_llm(demo_path, kv_cache_memory_bytes=256 << 20, **speculating(MOST)) as llm:
        runner = worker(llm).runner
        assert runner.storage.heads.distinct_pools[0] in runner.storage.distinct_pools
        runner.drafting.lengths = Pauses(MOST, 9, mtp.MOST_UNSEEN + 11)
        ask(llm, prompts, 4)
        proposals = Proposals(llm)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        found = ask(llm, prompts, 110)
        assert (
            mx.get_peak_memory() - before
            < min(pool.nbytes for pool in runner.storage.distinct_pools) / 4
        )
        assert [answer for _, answer in found] == [greedy.tokens(p, 110) for p in prompts]
        # In the pauses, the next pass is built while one runs.
        assert runner.forward.hits > mtp.MOST_UNSEEN / 2
        late = [one for one in proposals.made if len(one[0]) > 40 + mtp.MOST_UNSEEN]
        assert any(drafts for _, drafts in late)
        proposals.check()


@pytest.mark.full
def test_other_weights_after_sleep(demo_path: Path, greedy: Greedy, text: list[int]) -> None:
    expected = greedy.tokens(text[:30], COUNT)
    before = mx.get_active_memory()
    with in_process_llm(demo_path, enable_sleep_mode=True, **speculating(MOST)) as llm:
        assert ask(llm, [text[:30]])[0][1] == expected
        for level in (1, 2):
            llm.sleep(level)
            assert mx.get_active_memory() - before < 1 << 20
            llm.wake_up()
            if level == 2:
                llm.collective_rpc("reload_weights")
            proposals = Proposals(llm)
            assert ask(llm, [text[:30]])[0][1] == expected
            proposals.check()


def test_the_end_of_the_longest_sequence(demo_path: Path, greedy: Greedy, text: list[int]) -> None:
    with in_process_llm(demo_path, max_model_len=96, **speculating(MOST)) as llm:
        (answer,) = ask(llm, [text[:80]], 200)
        assert answer[1] == greedy.tokens(text[:80], 16)


def test_heads_that_fail_end_no_request(
    demo_path: Path,
    greedy: Greedy,
    text: list[int],
    caplog: pytest.LogCaptureFixture,
    errors_are_seen: None,
) -> None:
    with in_process_llm(demo_path, **speculating(MOST)) as llm:
        assert ask(llm, [text[:30]])[0][1] == greedy.tokens(text[:30], COUNT)
        del worker(llm).served.heads.join
        with caplog.at_level(logging.ERROR, logger="vllm_moe_compat"):
            for _ in range(2):
                assert ask(llm, [text[:30]])[0][1] == greedy.tokens(text[:30], COUNT)
    assert sum("propose no drafts any more" in r.getMessage() for r in caplog.records) == 1


@pytest.fixture
def errors_are_seen() -> Iterator[None]:
    """vLLM's set-up may stop the package's log from reaching pytest."""
    log = logging.getLogger("vllm_moe_compat")
    before, log.propagate = log.propagate, True
    yield
    log.propagate = before
