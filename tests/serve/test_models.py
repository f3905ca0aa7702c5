"""Plain models, served as mlx-lm loads them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import models
from support.engine import Greedy, in_process_llm, worker
from support.schedules import describe, make, play

pytestmark = pytest.mark.serve

SERVED = ("qwen3", "qwen3_moe", "mixtral", "mistral_windowed")


@pytest.fixture(scope="module")
def checkpoints(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in SERVED:
        models.write(root / family, family, demo_path)
    models.write_mlx_4bit(root / "qwen3_moe-4bit", root / "qwen3_moe")
    return root


def check(llm: Any, greedy: Greedy, seed: int = 4) -> None:
    arrivals = make(seed, worker(llm).cache_config.block_size, requests=8, longest=120, output=12)
    played = play(llm, arrivals)
    for arrival in arrivals:
        if arrival.req_id in played.tokens:
            want = greedy.tokens(arrival.prompt, arrival.max_tokens)
            assert played.tokens[arrival.req_id] == want, describe(seed, arrivals)
    assert len(played.tokens) > 4


@pytest.mark.parametrize("name", [*SERVED, "qwen3_moe-4bit"])
def test_plain_models_give_mlx_lms_tokens(name: str, checkpoints: Path) -> None:
    settings = {"max_model_len": 512, "max_num_batched_tokens": 64}
    with in_process_llm(checkpoints / name, **settings) as llm:
        check(llm, Greedy(checkpoints / name))


def test_prefix_caching_without_states(checkpoints: Path) -> None:
    with in_process_llm(
        checkpoints / "qwen3", enable_prefix_caching=True, max_model_len=512
    ) as llm:
        check(llm, Greedy(checkpoints / "qwen3"))


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    import mlx.core as mx

    before = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    yield
    mx.set_default_device(before)


@pytest.mark.usefixtures("on_the_cpu")
def test_bfloat16_experts_on_the_cpu_are_widened(
    checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLX's CPU ``gather_mm`` takes float32 only: the log and the budget show the widening."""
    import mlx.core as mx

    from vllm_moe_compat.backend.model.experts import WidenedSwitchLinear

    path = checkpoints / "qwen3_moe"
    logging.getLogger("vllm_moe_compat").propagate = True
    with (
        caplog.at_level("INFO", "vllm_moe_compat"),
        in_process_llm(path, max_model_len=256, dtype="bfloat16") as llm,
    ):
        model = worker(llm).served.model
        widened = [m for _, m in model.named_modules() if type(m) is WidenedSwitchLinear]
        assert len(widened) == 4 * 3
        assert all(m.weight.dtype == mx.float32 for m in widened)
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == mx.bfloat16
        assert worker(llm).budget.weights == sum(
            array.nbytes for _, array in _flatten(model.parameters())
        )
        # The same model object, without pages. Half precision may turn a near
        # tie, so what was chosen has to be as good as the best, not the best.
        prompt = list(range(20, 60))
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        chosen = list(output.outputs[0].token_ids)
        logits = model(mx.array([prompt + chosen]))[0, len(prompt) - 1 : -1].astype(mx.float32)
        taken = mx.take_along_axis(logits, mx.array(chosen)[:, None], axis=1)[:, 0]
        spread = logits.max(axis=1) - logits.min(axis=1)
        assert ((logits.max(axis=1) - taken) <= 0.02 * spread).all().item()
    assert "experts widened to float32" in caplog.text


def _flatten(tree: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(tree))


def test_the_4bit_checkpoint_stays_4bit(checkpoints: Path) -> None:
    import mlx.core as mx

    config = json.loads((checkpoints / "qwen3_moe-4bit" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    with in_process_llm(checkpoints / "qwen3_moe-4bit", max_model_len=256) as llm:
        experts = worker(llm).served.model.model.layers[0].mlp.switch_mlp
        assert experts.up_proj.weight.dtype == mx.uint32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_fp8_config_does_not_confine_the_dtype(demo_path: Path, dtype: str) -> None:
    """Golden text in every dtype; half precision also halves what a pool element holds."""
    from vllm import SamplingParams

    golden = json.loads((demo_path / "golden.json").read_text())
    with in_process_llm(
        demo_path, dtype=dtype, enable_prefix_caching=True, max_num_batched_tokens=32
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=golden["max_tokens"])
        prompts = [golden["prompt"], "Namespaces are one", golden["prompt"]]
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert outputs[0].outputs[0].text == golden["text"]
            assert outputs[2].outputs[0].text == golden["text"]
