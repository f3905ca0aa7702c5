"""With a share of the experts in memory, vLLM's sampler and grammars give the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.engine import in_process_llm, worker
from vllm_moe_compat.expert_cache.counters import counters
from vllm_moe_compat.expert_cache.install import containers

pytestmark = [pytest.mark.serve, pytest.mark.full]

PROMPTS = ["Beautiful is better than", "Zen ", "In the face of ambiguity,", "Now is better"]


def answers(path: Path) -> list[Any]:
    """One batch of constrained, sampled, penalised and greedy requests with log probabilities."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["count"],
        "additionalProperties": False,
    }
    params = [
        SamplingParams(
            temperature=1,
            seed=1,
            max_tokens=24,
            structured_outputs=StructuredOutputsParams(json=schema),
        ),
        SamplingParams(
            temperature=1,
            seed=2,
            max_tokens=12,
            structured_outputs=StructuredOutputsParams(regex=r"[a-f]{3}-\d{4}"),
        ),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=3, max_tokens=20),
        SamplingParams(
            temperature=0, repetition_penalty=1.2, presence_penalty=0.5, logprobs=5, max_tokens=20
        ),
    ]
    settings = {"backend": "xgrammar", "disable_any_whitespace": True}
    with in_process_llm(path, max_num_batched_tokens=24, structured_outputs_config=settings) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        cached = containers(worker(llm).served.model)
    said = [
        (o.outputs[0].text, tuple(o.outputs[0].token_ids), o.outputs[0].logprobs) for o in outputs
    ]
    return [said, bool(cached)]


def test_answers_are_those_of_the_resident_model(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, cached = answers(demo_path)
    assert not cached
    for share in ("50%", "25%"):
        monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", share)
        before = counters()
        found, cached = answers(demo_path)
        assert cached
        assert counters().misses > before.misses
        assert found == wanted
