"""Drafts on the demo checkpoint are accepted as often as its text and its head allow."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.engine import in_process_llm
from vllm_moe_compat import demo
from vllm_moe_compat.demo.text import END_OF_TEXT, zen

pytestmark = pytest.mark.serve

MTP = {"method": "mtp", "num_speculative_tokens": 2}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_PARK_DRAFTS", "0")


def _counted(llm: Any) -> tuple[int, list[int]]:
    """Return the number of verified rows, and the drafts accepted at each position."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    accepted = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return int(metrics["vllm:spec_decode_num_drafts"].value), list(accepted)


def _generate(llm: Any, prompt: str, count: int) -> str:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count)
    (answer,) = llm.generate([prompt], params, use_tqdm=False)
    return str(answer.outputs[0].text)


def test_the_heads_drafts_are_accepted_as_often_as_transformers_computed(
    demo_checkpoint: demo.DemoCheckpoint,
) -> None:
    head = json.loads((demo_checkpoint.path / "demo.json").read_text())["prediction_head"]
    with in_process_llm(
        demo_checkpoint.path, speculative_config=MTP, disable_log_stats=False
    ) as llm:
        # To the end of the verses: the text along which the shares were computed.
        answer = _generate(llm, demo_checkpoint.prompt, 256)
        rows, accepted = _counted(llm)
    assert (demo_checkpoint.prompt + answer).strip() == zen().split("\n\n", 1)[1].strip()
    # A verified row is one position of the text in up to three.
    assert rows >= 60
    for count, share in zip(accepted, head["accepted"][:2], strict=True):
        assert abs(count / rows - share) < 0.08


def test_ngrams_of_a_text_that_repeats_are_accepted(
    demo_checkpoint: demo.DemoCheckpoint,
) -> None:
    prompt = zen() + END_OF_TEXT + demo_checkpoint.prompt
    with in_process_llm(
        demo_checkpoint.path, speculative_config=NGRAM, disable_log_stats=False
    ) as llm:
        answer = _generate(llm, prompt, demo_checkpoint.max_tokens)
        rows, accepted = _counted(llm)
    assert answer == demo_checkpoint.text
    assert rows + sum(accepted) >= demo_checkpoint.max_tokens - 1
    assert accepted[3] / rows > 0.9
