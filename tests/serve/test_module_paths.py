"""One small model of each module path: vLLM's tokens are mlx-lm's.

Every path runs in a real engine: nine tenths of an engine's processor time are the load,
the self-check and the passes, which a test of the model runner alone would need as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import models
from support.engine import Greedy, in_process_llm, worker

pytestmark = pytest.mark.serve

LENGTHS = (3, 90, 17, 41, 64)
TOKENS = 16
# Prompts are cut into chunks and exceed every window; what remains is decoded together.
SETTINGS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "skip_tokenizer_init": True,
}


def generate(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if number % 4 == 0 else pytest.mark.full)
        for number, name in enumerate(models.MODULE_PATHS)
    ],
)
def test_a_ragged_batch_gives_mlx_lms_tokens(name: str, tmp_path: Path) -> None:
    compare(models.write_mlx(tmp_path / "model", name))


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """Its MXFP4 experts confine no dtype, and stay packed."""
    import mlx.core as mx

    def packed(llm: Any) -> None:
        experts = worker(llm).served.model.layers[0].mlp.experts
        assert experts.gate_proj.weight.dtype == mx.uint32

    compare(models.write_gpt_oss_mxfp4(tmp_path / "model"), packed)


def compare(
    path: Path, also: Callable[[Any], None] = lambda llm: None, vocabulary: int = 500
) -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(5, vocabulary) for _ in range(length)] for length in LENGTHS]
    with in_process_llm(path, **SETTINGS) as llm:
        found = generate(llm, prompts)
        also(llm)
    greedy = Greedy(path)
    want = [greedy.tokens(prompt, TOKENS) for prompt in prompts]
    assert found == want
    assert len({token for tokens in want for token in tokens}) > TOKENS
