"""Write a trained model in the form of Qwen3.6-35B-A3B-FP8 on the hub.

The traits of that form that a loader must handle:

* the language model is nested: ``text_config``, ``model.language_model.``;
* each expert has three tensors, ``[I, H]``, ``[I, H]``, ``[H, I]``;
* matrices are E4M3, with one bfloat16 scale for each block of 128x128
  (``weight_scale_inv``, ``[ceil(O/128), ceil(I/128)]``): w = q * scale;
* small or sensitive modules stay bfloat16 and are listed in ``modules_to_not_convert``;
* a multi-token-prediction head is included, and a vision tower (random here);
* several shards, with an index.

Norms are stored less 1 (the module computes 1 + weight) and convolutions as ``[C, 1, K]``,
as transformers saves them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.numbers.fp8_ops import WrittenFp8
from vllm_moe_compat.demo.text import END_OF_TEXT, TURN_END
from vllm_moe_compat.demo.training import text_config

BLOCK = 128
E4M3_MAX = 448.0
SHARDS = 4
VISION_HIDDEN = 32

_FP8_MODULES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")),
    *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
)


def quantize(weight: Any) -> tuple[Any, Any]:
    """Return E4M3 values ``[O, I]`` and bfloat16 scales ``[ceil(O/128), ceil(I/128)]``.

    A scale is rounded to bfloat16 before the division, so that the values match the stored
    scale. Blocks at the edges are smaller, not padded.
    """
    import torch

    weight = weight.float()
    rows, columns = (range(0, size, BLOCK) for size in weight.shape)
    scales = torch.empty(len(rows), len(columns), dtype=torch.bfloat16)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            block = weight[row : row + BLOCK, column : column + BLOCK]
            scale = (block.abs().max() / E4M3_MAX).clamp(min=1e-12).to(torch.bfloat16)
            scaled = (block / scale.float()).clamp(-E4M3_MAX, E4M3_MAX)
            scales[i, j] = scale
            values[row : row + BLOCK, column : column + BLOCK] = scaled.to(torch.float8_e4m3fn)
    return values, scales


def language_tensors(model: Any) -> dict[str, Any]:
    """Return the language model's tensors; published name → tensor."""
    tensors: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        _put(tensors, name.replace("model.", "model.language_model.", 1), value.detach())
    return tensors


def head_tensors(head: Any) -> dict[str, Any]:
    """Return the prediction head's tensors; published name → tensor."""
    tensors: dict[str, Any] = {}
    for name, value in head.state_dict().items():
        _put(tensors, f"mtp.{name}", value.detach())
    return tensors


def vision_tensors(generator: Any) -> dict[str, Any]:
    """Return a vision tower of noise; published name → tensor."""
    tensors: dict[str, Any] = {}
    for name, shape in _vision_shapes(text_config()["hidden_size"]).items():
        _put(tensors, f"model.visual.{name}", noise(generator, *shape))
    return tensors


def noise(generator: Any, *shape: int) -> Any:
    """Return the normal noise with which weights are initialised."""
    import torch

    return 0.02 * torch.randn(shape, generator=generator)


def _put(tensors: dict[str, Any], name: str, value: Any) -> None:
    """Add one tensor of the model: split by expert, converted to FP8, or as bfloat16."""
    import torch

    if name.endswith("mlp.experts.gate_up_proj"):  # [E, 2I, H], gate first
        for e, both in enumerate(value):
            for projection, part in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                _put_fp8(tensors, name.replace("gate_up_proj", f"{e}.{projection}"), part)
    elif name.endswith("mlp.experts.down_proj"):  # [E, H, I]
        for e, part in enumerate(value):
            _put_fp8(tensors, name.replace("down_proj", f"{e}.down_proj"), part)
    elif name.endswith(tuple(f"{module}.weight" for module in _FP8_MODULES)):
        _put_fp8(tensors, name.removesuffix(".weight"), value)
    else:
        tensors[name] = value.to(torch.bfloat16).contiguous()


def _put_fp8(tensors: dict[str, Any], module: str, value: Any) -> None:
    tensors[f"{module}.weight"], tensors[f"{module}.weight_scale_inv"] = quantize(value)


def _vision_shapes(out: int) -> dict[str, tuple[int, ...]]:
    hidden, merged = VISION_HIDDEN, 4 * VISION_HIDDEN
    matrices: dict[str, tuple[int, ...]] = {
        "blocks.0.attn.qkv": (3 * hidden, hidden),
        "blocks.0.attn.proj": (hidden, hidden),
        "blocks.0.mlp.linear_fc1": (2 * hidden, hidden),
        "blocks.0.mlp.linear_fc2": (hidden, 2 * hidden),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (out, merged),
        "patch_embed.proj": (hidden, 3, 2, 16, 16),
    }
    norms = ("blocks.0.norm1", "blocks.0.norm2", "merger.norm")
    shapes = {f"{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    shapes |= {f"{name}.{part}": (hidden,) for name in norms for part in ("weight", "bias")}
    shapes["pos_embed.weight"] = (16, hidden)
    return shapes


def hub_config(tensors: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return ``config.json``."""
    import transformers

    converted = {name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")}
    kept = {
        name.removesuffix(".weight").removesuffix(".bias")
        for name in tensors
        if name not in converted and not name.endswith("_scale_inv")
    }
    token = tokenizer.convert_tokens_to_ids
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "text_config": text_config() | {"eos_token_id": token(END_OF_TEXT)},
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": VISION_HIDDEN,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 2 * VISION_HIDDEN,
            "model_type": "qwen3_5_moe",
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": text_config()["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "tie_word_embeddings": False,
        "transformers_version": transformers.__version__,
        "quantization_config": WrittenFp8((BLOCK, BLOCK)).quantization_config(kept),
    }


def write(folder: Path, tensors: dict[str, Any], tokenizer: Any) -> None:
    """Write shards, index, config and tokenizer into an existing folder."""
    from safetensors.torch import save_file

    # As on the hub, a shard ends when it is full, even within a layer.
    total = sum(value.nbytes for value in tensors.values())
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, value in tensors.items():
        if filled >= total * len(shards) / SHARDS:
            shards.append({})
        shards[-1][name] = value
        filled += value.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    write_json(folder / "config.json", hub_config(tensors, tokenizer))
    write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT]),
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    tokenizer.save_pretrained(folder)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON with a final line break, as in files on the hub."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
