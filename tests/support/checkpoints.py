"""Tiny random Qwen3.5 checkpoints in every form that the hub knows.

``build`` makes a transformers model with random values in *every* tensor and
writes it as a dict of torch tensors in the wanted form, with a config to match.
Where the form is FP8 the model gets the dequantised values back, computed here
and not by the package, so it stays the oracle. All values are bfloat16's, and the
norms' are multiples of 1/64, so that a bfloat16 file loses nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "model.language_model."
FP8_MODULES = (
    *(f"self_attn.{n}_proj.weight" for n in "qkvo"),
    *(f"linear_attn.{n}.weight" for n in ("in_proj_qkv", "in_proj_z", "out_proj")),
    *(f"mlp.shared_expert.{n}_proj.weight" for n in ("gate", "up", "down")),
    *(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Checkpoint:
    """Tensors and config as they go to disk, and the torch model that they mean."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    model: Any = None
    index: bool = True

    def write(self, path: Path, shards: int = 2) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        names = list(self.tensors)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = names[shard::shards]
            save_file({n: self.tensors[n].contiguous() for n in part}, path / file)
            weight_map |= dict.fromkeys(part, file)
        if self.index:
            index = {"metadata": {}, "weight_map": weight_map}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path

    def logits(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([tokens]), use_cache=False).logits[0]


@dataclass(frozen=True)
class Fp8:
    block: tuple[int, int] = (128, 128)
    scale: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    hidden: int = 64
    intermediate: int = 32
    experts: int = 4
    layers: int = 4
    extra: dict[str, Any] = field(default_factory=dict)


def text_config(sizes: Sizes, dense: bool) -> dict[str, Any]:
    config = {
        "vocab_size": 96,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    }
    if dense:
        return config | {"model_type": "qwen3_5_text", "intermediate_size": sizes.intermediate}
    return config | {
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": sizes.intermediate,
        "shared_expert_intermediate_size": 48,
        "num_experts": sizes.experts,
        "num_experts_per_tok": 2,
    }


def random_model(config: dict[str, Any], seed: int = 0) -> Any:
    import transformers

    name = "Qwen3_5Moe" if "num_experts" in config else "Qwen3_5"
    torch.manual_seed(seed)
    known = {k: v for k, v in config.items() if k not in ("model_type", "full_attention_interval")}
    settings = getattr(transformers, f"{name}TextConfig")(**known)
    model = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                value = torch.randint(-24, 25, parameter.shape) / 64
            else:
                value = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
            parameter.copy_(value.bfloat16().float())
    return model


def quantize(weight: torch.Tensor, fp8: Fp8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E4M3 values and scales for the last two axes; edge blocks are smaller."""
    *lead, rows, columns = weight.shape
    b0, b1 = fp8.block
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % b1, 0, -rows % b0))
    tiles = padded.reshape(*lead, padded.shape[-2] // b0, b0, padded.shape[-1] // b1, b1)
    scale = (tiles.abs().amax((-3, -1)) / 448).clamp(min=1e-8).to(fp8.scale)
    values = tiles / scale.float()[..., :, None, :, None]
    values = values.clamp(-448, 448).to(torch.float8_e4m3fn).float().reshape(padded.shape)
    return values[..., :rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


def dequantize(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    *_, rows, columns = values.shape
    wide = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return values.float() * wide[..., :rows, :columns]


def build(
    form: str = "per-expert",
    fp8: Fp8 | None = None,
    *,
    dense: bool = False,
    mtp: bool = False,
    vision: bool = False,
    sizes: Sizes | None = None,
    prefix: str = PREFIX,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
) -> Checkpoint:
    """Make a checkpoint; ``form`` is ``per-expert`` or ``combined``."""
    sizes = sizes or Sizes()
    text = text_config(sizes, dense)
    model = random_model(text, seed)
    tensors: dict[str, torch.Tensor] = {}

    def put(name: str, value: torch.Tensor, convert: bool) -> torch.Tensor:
        """Store under the name, quantised if asked; return the value that it means."""
        if fp8 is None or not convert:
            tensors[name] = value.to(dtype)
            return value
        tensors[name], tensors[f"{name}_scale_inv"] = quantize(value, fp8)
        return dequantize(tensors[name], tensors[f"{name}_scale_inv"], fp8.block)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path = name if name == "lm_head.weight" else prefix + name.removeprefix("model.")
            if ".experts." in name and form == "per-expert":
                parameter.copy_(_per_expert(path, parameter, put))
            else:
                convert = name.endswith(FP8_MODULES) or ".experts." in name
                parameter.copy_(put(path, parameter.detach().clone(), convert))
    if mtp:
        _add_mtp(tensors, sizes, fp8 is not None)
    if vision:
        tensors["model.visual.blocks.0.attn.qkv.weight"] = torch.randn(6, 8).bfloat16()
        tensors["model.visual.merger.norm.weight"] = torch.randn(8).bfloat16()

    family = "qwen3_5" if dense else "qwen3_5_moe"
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [f"Qwen3_5{'' if dense else 'Moe'}ForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": text,
    }
    if prefix == "model.":
        config = text | {"model_type": family}
    if fp8 is not None:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(fp8.block),
            "modules_to_not_convert": ["lm_head"],
        }
    return Checkpoint(tensors, config, model)


def _per_expert(path: str, value: torch.Tensor, put: Any) -> torch.Tensor:
    """Write ``[E, 2I, H]`` or ``[E, H, I]`` as one tensor per expert and projection."""
    base, _, kind = path.rpartition(".")
    experts = []
    for e, matrix in enumerate(value.detach().clone()):
        if kind == "down_proj":
            experts.append(put(f"{base}.{e}.down_proj.weight", matrix, True))
        else:
            halves = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
            experts.append(torch.cat([put(f"{base}.{e}.{n}.weight", m, True) for n, m in halves]))
    return torch.stack(experts)


def _add_mtp(tensors: dict[str, torch.Tensor], sizes: Sizes, fp8: bool) -> None:
    """Add a prediction head that is incomplete: experts with a gap, a scale missing."""
    tensors["mtp.fc.weight"] = torch.randn(8, 16).bfloat16()
    tensors["mtp.layers.0.input_layernorm.weight"] = torch.randn(8).bfloat16()
    for e in (0, 2):
        name = f"mtp.layers.0.mlp.experts.{e}.gate_proj.weight"
        tensors[name] = torch.randn(8, 8).to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
    if fp8:
        tensors["mtp.layers.0.mlp.experts.0.gate_proj.weight_scale_inv"] = torch.ones(1, 1)
