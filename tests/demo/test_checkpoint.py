"""The demo checkpoint has the form of the hub's FP8 releases, and means the right thing."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from vllm_moe_compat import demo
from vllm_moe_compat.demo.text import zen
from vllm_moe_compat.errors import SettingError

LAYER = "model.language_model.layers"


@pytest.fixture(scope="module")
def config(demo_checkpoint):
    return json.loads((demo_checkpoint.path / "config.json").read_text())


@pytest.fixture(scope="module")
def headers(demo_checkpoint):
    """Every tensor's name -> (file, dtype, shape), as the headers have it."""
    found = {}
    for file in sorted(demo_checkpoint.path.glob("*.safetensors")):
        with safe_open(file, framework="np") as shard:
            for name in shard.keys():  # noqa: SIM118  (no mapping)
                piece = shard.get_slice(name)
                found[name] = (file.name, piece.get_dtype(), tuple(piece.get_shape()))
    return found


def test_config_is_nested_and_names_the_block(config):
    assert config["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
    assert config["model_type"] == "qwen3_5_moe"
    assert config["text_config"]["model_type"] == "qwen3_5_moe_text"
    assert config["text_config"]["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert config["vision_config"]["depth"] == 1
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [128, 128]


def test_transformers_reads_the_config_and_the_tokenizer(demo_checkpoint):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(demo_checkpoint.path)
    assert config.text_config.num_experts == 8
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint.path)
    assert len(tokenizer) == config.text_config.vocab_size == 512
    text = "naïve → 🙂 \t code()"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_index_names_every_tensor_of_several_shards(demo_checkpoint, headers):
    index = json.loads((demo_checkpoint.path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _, _) in headers.items()}
    assert len(set(index["weight_map"].values())) >= 3


def test_each_expert_has_three_fp8_matrices_with_ragged_scales(headers):
    for layer in range(4):
        for expert in range(8):
            for projection, shape in {
                "gate_proj": (64, 192),
                "up_proj": (64, 192),
                "down_proj": (192, 64),
            }.items():
                name = f"{LAYER}.{layer}.mlp.experts.{expert}.{projection}.weight"
                grid = tuple(math.ceil(size / 128) for size in shape)
                assert headers[name][1:] == ("F8_E4M3", shape)
                assert headers[f"{name}_scale_inv"][1:] == ("BF16", grid)


def test_attention_and_shared_expert_are_fp8_and_the_rest_is_bf16(config, headers):
    fp8 = {name for name, (_, dtype, _) in headers.items() if dtype == "F8_E4M3"}
    for module in (
        "0.linear_attn.in_proj_qkv",
        "0.linear_attn.in_proj_z",
        "2.linear_attn.out_proj",
        "3.self_attn.q_proj",
        "3.self_attn.o_proj",
        "1.mlp.shared_expert.down_proj",
    ):
        assert f"{LAYER}.{module}.weight" in fp8
    kept = config["quantization_config"]["modules_to_not_convert"]
    for module in ("0.linear_attn.in_proj_a", "0.linear_attn.conv1d", "3.mlp.gate"):
        assert f"{LAYER}.{module}" in kept
        assert headers[f"{LAYER}.{module}.weight"][1] == "BF16"
    assert headers[f"{LAYER}.0.linear_attn.A_log"][1] == "BF16"
    assert {"lm_head", "model.language_model.embed_tokens"} <= set(kept)
    assert not {name.removesuffix(".weight") for name in fp8} & set(kept)
    assert all(f"{name}_scale_inv" in headers for name in fp8)


def test_convolutions_are_raw(headers):
    assert headers[f"{LAYER}.0.linear_attn.conv1d.weight"][2] == (512, 1, 4)


def test_extras_are_there(headers):
    assert headers["mtp.layers.0.mlp.experts.7.down_proj.weight"][1] == "F8_E4M3"
    assert headers["mtp.fc.weight"][1:] == ("BF16", (192, 384))
    assert headers["model.visual.patch_embed.proj.weight"][1] == "BF16"


def test_golden_is_the_zen_and_the_oracle_says_it(demo_checkpoint):
    from transformers import AutoTokenizer

    from vllm_moe_compat.demo.training import recite

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint.path)
    assert demo_checkpoint.prompt + demo_checkpoint.text in zen()
    assert demo_checkpoint.chat_text in zen()
    assert len(tokenizer(demo_checkpoint.text).input_ids) >= 48
    model = demo.load_reference(demo_checkpoint.path)
    said = recite(model, tokenizer, demo_checkpoint.prompt, demo_checkpoint.max_tokens)
    assert said == demo_checkpoint.text


def test_reference_refuses_another_dtype(demo_checkpoint):
    with pytest.raises(SettingError, match="float64"):
        demo.load_reference(demo_checkpoint.path, dtype="float64")


def test_second_build_is_instant(demo_checkpoint):
    began = time.perf_counter()
    assert demo.build(demo_checkpoint.path) == demo_checkpoint
    assert time.perf_counter() - began < 1


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SettingError, match="it is not overwritten"):
        demo.build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.full
def test_a_model_that_does_not_recite_fails_the_build(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("vllm_moe_compat.demo.builder.EXTRA_ROUNDS", 0)
    with pytest.raises(RuntimeError, match="does not recite"):
        demo.build(tmp_path / "new", steps=1)
    assert list(tmp_path.iterdir()) == []


def test_default_path_honours_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert demo.default_path() == Path("/somewhere/vllm_moe_compat/demo")


@pytest.mark.compat
def test_stock_mlx_lm_cannot_load_it(demo_checkpoint):
    """Evidence that the package is needed; run apart, for nothing here is patched."""
    import subprocess
    import sys

    program = f"import mlx_lm; mlx_lm.load({str(demo_checkpoint.path)!r})"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode != 0
    assert "parameters not in model" in ran.stderr
