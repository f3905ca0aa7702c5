"""Scaled rotary embeddings on the embedded backend, with transformers as the oracle."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from support import models
from support.engine import in_process_llm

pytestmark = [
    pytest.mark.serve,
    pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch"),
]

ORIGINAL = 64
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "truncate": False,
    "attention_factor": 1.1,
    "original_max_position_embeddings": ORIGINAL,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(16)],
    "long_factor": [2.0 + 0.2 * i for i in range(16)],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 8.0,
}
PROMPTS = [[(7 * i * i + 3 * i + 5) % 500 for i in range(length)] for length in (3, 40, 90, 150)]


def checkpoint(path: Path, rope: dict[str, Any]) -> Path:
    models.write(path, "qwen3_moe", tokenizer_from=path)
    config = json.loads((path / "config.json").read_text())
    config["rope_scaling"] = rope
    (path / "config.json").write_text(json.dumps(config))
    return path


def oracle(path: Path, prompt: list[int], count: int, **rope: Any) -> list[int]:
    """Return transformers' greedy tokens, under changed rotary settings."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    config.rope_parameters |= rope
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def served(path: Path, prompts: list[list[int]], count: int, length: int) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    settings = {"dtype": "float32", "max_model_len": length, "skip_tokenizer_init": True}
    with in_process_llm(path, **settings) as llm:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(given, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_yarn_as_published(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, YARN)
    want = [oracle(path, prompt, 12) for prompt in PROMPTS]
    assert want != [oracle(path, prompt, 12, truncate=True) for prompt in PROMPTS]
    assert served(path, PROMPTS, 12, 512) == want


@pytest.mark.parametrize(("length", "which"), [(ORIGINAL, "short"), (512, "long")])
def test_longrope_has_one_set_of_factors_per_server(
    length: int,
    which: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = checkpoint(tmp_path, LONGROPE)
    prompts = [prompt for prompt in PROMPTS if len(prompt) + 12 <= length]
    factors = LONGROPE[f"{which}_factor"]
    want = [
        oracle(path, prompt, 12, short_factor=factors, long_factor=factors) for prompt in prompts
    ]
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    with caplog.at_level("INFO", "vllm_moe_compat"):
        assert served(path, prompts, 12, length) == want
    assert f"the {which} factors of LongRoPE are in force" in caplog.text
