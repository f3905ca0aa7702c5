"""What inspect says of a packed or odd checkpoint is what its load does.

Tensors hold noise: names, dtypes and shapes decide.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vllm_moe_compat
from support.agreement import check_agreement, planned_loads
from support.loading import load

Tensors = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _hooks():
    with vllm_moe_compat.applied():
        yield


def pack_quantized(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}_packed": torch.ones(rows, columns // 8, dtype=torch.int32),
        f"{name}_scale": torch.ones(rows, columns // 32),
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def nvfp4(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}_packed": torch.ones(rows, columns // 2, dtype=torch.uint8),
        f"{name}_scale": torch.ones(rows, columns // 16).to(E4M3),
        f"{name}_global_scale": torch.ones(1),
    }


def modelopt_nvfp4(name: str, rows: int, columns: int) -> Tensors:
    return {
        name: torch.ones(rows, columns // 2, dtype=torch.uint8),
        f"{name}_scale": torch.ones(rows, columns // 16).to(E4M3),
        f"{name}_scale_2": torch.ones(()),
    }


def fp8_and_nvfp4(name: str, rows: int, columns: int) -> Tensors:
    if "self_attn" not in name:
        return nvfp4(name, rows, columns)
    return {name: torch.ones(rows, columns).to(E4M3), f"{name}_scale": torch.ones(rows, 1)}


def fp8_4d(name: str, rows: int, columns: int) -> Tensors:
    grid = (-(-rows // 128), 1, -(-columns // 128), 1)
    return {name: torch.ones(rows, columns).to(E4M3), f"{name}_scale": torch.ones(grid)}


def awq(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": torch.ones(columns, rows // 8, dtype=torch.int32),
        f"{stem}qzeros": torch.ones(columns // 32, rows // 8, dtype=torch.int32),
        f"{stem}scales": torch.ones(columns // 32, rows, dtype=torch.float16),
    }


def gptq(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": torch.ones(columns // 8, rows, dtype=torch.int32),
        f"{stem}qzeros": torch.ones(columns // 32, rows // 8, dtype=torch.int32),
        f"{stem}scales": torch.ones(columns // 32, rows, dtype=torch.float16),
        f"{stem}g_idx": torch.arange(columns, dtype=torch.int32) // 32,
    }


def floats(name: str, rows: int, columns: int) -> Tensors:
    return {name: torch.ones(rows, columns)}


PACKED = {"quant_method": "compressed-tensors"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT4 = {
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
REFUSED = {"compressed-tensors int4, no width": "has no integer group in config_groups"}
FORMS: dict[str, tuple[Callable[[str, int, int], Tensors], dict[str, Any]]] = {
    "compressed-tensors int4": (pack_quantized, PACKED | INT4),
    "compressed-tensors int4, no width": (pack_quantized, PACKED | {"format": "pack-quantized"}),
    "compressed-tensors NVFP4": (nvfp4, PACKED | {"format": "nvfp4-pack-quantized"}),
    "compressed-tensors FP8 and NVFP4": (fp8_and_nvfp4, PACKED | {"format": "mixed-precision"}),
    "ModelOpt NVFP4": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "ModelOpt FP8_PB_WO": (fp8_4d, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}),
    "ModelOpt, of the cache alone": (floats, {"quant_method": "modelopt", "quant_algo": None}),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "MLX without a method": (floats, {"bits": 4, "group_size": 64}),
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.filterwarnings("ignore:::transformers")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["Llama", "Qwen3Moe"])
def test_packed_weights(kind: str, name: str, tmp_path: Path):
    form, quantization = FORMS[name]
    settings = SIZES | (MOE if kind == "Qwen3Moe" else {})
    model = getattr(transformers, f"{kind}ForCausalLM")
    model(getattr(transformers, f"{kind}Config")(**settings)).save_pretrained(tmp_path)
    tensors: Tensors = {}
    for weight, tensor in load_file(tmp_path / "model.safetensors").items():
        made = form(weight, *tensor.shape) if weight.endswith("_proj.weight") else {weight: tensor}
        tensors |= made
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    refusal = None
    with planned_loads() as plans:
        if name not in REFUSED:
            load(tmp_path)
        else:
            with pytest.raises(ValueError, match=REFUSED[name]) as caught:
                load(tmp_path)
            refusal = str(caught.value)
    check_agreement(tmp_path, plans, refusal)


@pytest.mark.filterwarnings("ignore:::transformers")
@pytest.mark.parametrize("setting", ["8bit", "4bit"])
def test_a_packed_checkpoint_is_not_quantised_again(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", setting)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.scales"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="quantised already") as caught:
        load(tmp_path)
    check_agreement(tmp_path, [], str(caught.value))
