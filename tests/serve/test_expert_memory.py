"""Processes that serve with a share of the experts never hold more than that share.

Measured by the kernel's own count of the most memory that a process held (``VmHWM``), against a
process that serves the same model with next to no experts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.serve, pytest.mark.full, pytest.mark.timeout(900)]

HIDDEN, INNER, LAYERS, EXPERTS, PER_TOKEN = 512, 256, 4, 64, 2
EXPERT = 3 * HIDDEN * INNER * 4  # bytes in float32
LAYER = EXPERTS * EXPERT

SCRIPT = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import numpy as np
from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype="float32", max_model_len=256, max_num_seqs=4, skip_tokenizer_init=True,
          kv_cache_memory_bytes=16 << 20, max_num_batched_tokens=64, seed=0)
draw = np.random.default_rng(0)
prompts = [{"prompt_token_ids": draw.integers(5, 500, n).tolist()} for n in (64, 40, 7, 100)]
params = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
found = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)]
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("TOKENS", found)
print("PEAK", int(peak.split()[1]) * 1024)
llm.llm_engine.engine_core.shutdown()
"""


def write(path: Path, experts: int, form: str) -> Path:
    """Write a random qwen3_moe as it is published, in float32 or block FP8."""
    import torch
    from safetensors.torch import save_file

    path.mkdir()
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": experts,
        "num_experts_per_tok": PER_TOKEN,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "vocab_size": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }
    if form == "block FP8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        }
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)

    def put(tensors: dict[str, torch.Tensor], name: str, *shape: int) -> None:
        tensor = torch.randn(shape) / shape[-1] ** 0.5
        if form == "block FP8" and "_proj" in name:
            tensors[f"{name}.weight_scale_inv"] = torch.ones(
                [-(-size // 128) for size in shape], dtype=torch.float32
            )
            tensor = tensor.to(torch.float8_e4m3fn)
        tensors[f"{name}.weight"] = tensor

    for layer in range(LAYERS):
        tensors: dict[str, torch.Tensor] = {}
        root = f"model.layers.{layer}"
        for name, rows in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128)):
            put(tensors, f"{root}.self_attn.{name}", rows, HIDDEN)
        put(tensors, f"{root}.self_attn.o_proj", HIDDEN, 256)
        put(tensors, f"{root}.mlp.gate", experts, HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{root}.{name}.weight"] = torch.ones(HIDDEN)
        for name in ("q_norm", "k_norm"):
            tensors[f"{root}.self_attn.{name}.weight"] = torch.ones(64)
        for expert in range(experts):
            for name in ("gate_proj", "up_proj"):
                put(tensors, f"{root}.mlp.experts.{expert}.{name}", INNER, HIDDEN)
            put(tensors, f"{root}.mlp.experts.{expert}.down_proj", HIDDEN, INNER)
        save_file(tensors, path / f"model-{layer}.safetensors", metadata={"format": "pt"})
    tensors = {"model.norm.weight": torch.ones(HIDDEN)}
    put(tensors, "model.embed_tokens", 512, HIDDEN)
    put(tensors, "lm_head", 512, HIDDEN)
    save_file(tensors, path / "model-others.safetensors", metadata={"format": "pt"})
    return path


def serve(path: Path, cache: str) -> tuple[str, int]:
    """The tokens of some prompts, and the most memory that the process held."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        env=os.environ | {"VLLM_MOE_COMPAT_EXPERT_CACHE": cache},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line.split(" ", 1) for line in done.stdout.splitlines() if " " in line]
    found = {name: value for name, value in lines if name in ("TOKENS", "PEAK")}
    return found["TOKENS"], int(found["PEAK"])


@pytest.mark.parametrize(("form", "cache"), [("float32", "12.5%"), ("block FP8", "25%")])
def test_the_peak_is_the_rest_and_the_cache(form: str, cache: str, tmp_path: Path) -> None:
    few = write(tmp_path / "few", PER_TOKEN, form)
    _, rest = serve(few, "off")
    rest -= LAYERS * PER_TOKEN * EXPERT
    path = write(tmp_path / "model", EXPERTS, form)
    wanted, whole = serve(path, "off")
    assert whole > rest + LAYERS * LAYER
    tokens, peak = serve(path, cache)
    assert tokens == wanted
    share = float(cache[:-1]) / 100 * LAYERS * LAYER
    assert peak <= rest + share + LAYER / 4
