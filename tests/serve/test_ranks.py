"""Two ranks compute one model together; vLLM's executor starts them as processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import rank_engine
from support.engine import Greedy

pytestmark = pytest.mark.serve

# The second and the last share a beginning of several blocks; the third takes several chunks.
LONG = [20 + i % 150 for i in range(170)]
PROMPTS = [[5, 6, 7, 8, 9], LONG[:90], [*LONG[::-1], *LONG[:40]], [3, 1, 4, 1, 5], LONG]
SEEDED = {"temperature": 1.0, "seed": 7, "top_p": 0.9}
CHOICE = {"temperature": 1.0, "seed": 3, "ignore_eos": False, "choice": ["left", "right"]}
JOBS: dict[str, dict[str, Any]] = {
    "greedy": {"prompts": PROMPTS},
    "sleep": {"sleep": 1},
    "cached": {"prompts": PROMPTS},
    "seeded": {"prompts": PROMPTS[:2], "params": SEEDED},
    "seeded again": {"prompts": PROMPTS[:2], "params": SEEDED},
    "choice": {"prompts": PROMPTS[:1], "params": CHOICE},
    "held": {"held": True},
    "refused": {"call": "reset_weights"},
    "after a refusal": {"call": "list_loras"},
    "refused again": {"call": "reset_weights"},
    "after another": {"call": "list_loras"},
}


@pytest.fixture(scope="module")
def found(demo_path: Path) -> dict[str, Any]:
    """Results of two ranks, with async scheduling and fewer pages than the prompts need."""
    results, log = rank_engine.run(
        demo_path,
        list(JOBS.values()),
        tensor_parallel_size=2,
        enable_prefix_caching=True,
        max_num_batched_tokens=96,
        max_num_seqs=8,
        max_model_len=432,
        num_gpu_blocks_override=34,
    )
    return dict(zip(JOBS, results, strict=True)) | {"log": log}


def test_they_have_the_tokens_of_one_process(found: dict[str, Any], greedy: Greedy) -> None:
    wanted = [greedy.tokens(prompt, 24) for prompt in PROMPTS]
    for job in ("greedy", "cached"):
        assert [tokens for tokens, _ in found[job]] == wanted


def test_each_has_half_of_the_layers_weights(found: dict[str, Any], greedy: Greedy) -> None:
    from mlx.utils import tree_flatten

    one, other = found["held"]
    in_layers = sum(array.nbytes for _, array in tree_flatten(greedy.model.layers))
    everything = sum(array.nbytes for _, array in tree_flatten(greedy.model.parameters()))
    assert one == other
    assert one < everything - 0.45 * in_layers


def test_sleep_is_refused_before_anything_is_paused(found: dict[str, Any]) -> None:
    assert "An engine of several ranks does not give memory back" in found["sleep"]
    assert found["cached"] == found["greedy"]


def test_they_divide_the_memory_of_their_machine(found: dict[str, Any]) -> None:
    assert found["log"].count("2 processes share this machine") == 2


def test_seeds_and_structured_output_have_one_answer(found: dict[str, Any]) -> None:
    assert found["seeded"] == found["seeded again"]
    ((_, text),) = found["choice"]
    assert text in ("left", "right")


def test_a_call_that_fails_on_the_ranks_leaves_no_answer_for_the_next(
    found: dict[str, Any],
) -> None:
    for refused, after in (("refused", "after a refusal"), ("refused again", "after another")):
        assert "rank 0: UnsupportedServingError: " in found[refused]
        assert found[after] == ["set()", "set()"]
