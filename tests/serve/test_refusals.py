"""The embedded backend refuses unsupported settings at start-up, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import models
from support.engine import in_process_llm

pytestmark = pytest.mark.serve


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"speculative_config": {"method": "suffix", "num_speculative_tokens": 2}},
            "--speculative-config with method suffix",
        ),
        ({"enable_lora": True}, "LoRA"),
        ({"tensor_parallel_size": 2, "enable_sleep_mode": True}, "--enable-sleep-mode on several"),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, "no all-to-all"),
        ({"tensor_parallel_size": 2, "enable_dbo": True}, "batches cut in two"),
        ({"kv_cache_dtype": "fp8"}, "kv-cache-dtype"),
        ({"kv_cache_dtype": "bfloat16"}, "the cache has the model's dtype"),
        ({"runner": "pooling"}, "this runner"),
        ({"load_format": "dummy"}, "--load-format dummy"),
        ({"hf_overrides": {"rope_theta": 5.0}}, "--hf-overrides"),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_settings(demo_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words), in_process_llm(demo_path, **settings):
        pass


def test_quantisation_that_nobody_would_do_is_refused(demo_path: Path, tmp_path: Path) -> None:
    path = models.write(tmp_path / "plain", "qwen3", demo_path)
    with (
        pytest.raises(ValueError, match="--quantization fp8: the checkpoint is not quantised"),
        in_process_llm(path, quantization="fp8", dtype="bfloat16", max_model_len=256),
    ):
        pass


def test_watermarks_are_refused_by_every_vllm(demo_path: Path) -> None:
    """Releases with the setting are refused by our error; 0.27 does not know the setting."""
    with (
        pytest.raises((ValueError, TypeError), match="watermark"),
        in_process_llm(demo_path, watermark_config={"key": 1}),
    ):
        pass


def test_the_step_encoding_that_is_not_read(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="reads the step encoding"), in_process_llm(demo_path):
        pass


def test_code_that_reaches_into_its_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import DeepseekV3Config

    # For a DeepSeek-V3.2, vLLM changes this class: put it back for the parity tests.
    monkeypatch.setattr(DeepseekV3Config, "model_type", DeepseekV3Config.model_type)
    path = models.write_mlx(tmp_path / "indexed", "deepseek_v32")
    with (
        pytest.raises(ValueError, match=r"mlx_lm\.models\.deepseek_v32: its code") as refusal,
        in_process_llm(path, max_model_len=256, skip_tokenizer_init=True),
    ):
        pass
    assert "does not run on paged caches" in str(refusal.value)


def test_memory_that_does_not_suffice_is_refused_with_the_numbers(demo_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="MiB") as refusal,
        in_process_llm(demo_path, kv_cache_memory_bytes=None, gpu_memory_utilization=1e-4),
    ):
        pass
    assert "weights take" in str(refusal.value)


def test_a_request_of_another_kind_is_refused(demo_path: Path) -> None:
    import torch

    with in_process_llm(demo_path, enable_prompt_embeds=True) as llm:
        with pytest.raises(ValueError, match="takes text or token ids"):
            llm.generate({"prompt_embeds": torch.zeros(3, 192)}, use_tqdm=False)
        # And the engine goes on.
        assert llm.generate("Beautiful", use_tqdm=False)[0].outputs[0].text


def test_an_architecture_without_a_stand_in_is_named(demo_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "renamed"
    shutil.copytree(demo_path, path)
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["ImaginaryForCausalLM"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ImaginaryForCausalLM"), in_process_llm(path):
        pass


def test_experts_on_disk_on_several_ranks_are_refused(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "50%")
    with (
        pytest.raises(ValueError, match="VLLM_MOE_COMPAT_EXPERT_CACHE=50% on several ranks"),
        in_process_llm(demo_path, tensor_parallel_size=2),
    ):
        pass
