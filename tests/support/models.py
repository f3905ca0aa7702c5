"""Small random checkpoints of families that stock mlx-lm loads by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

# Long enough for prefix-cache tests, short enough for two cores.
_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    # Served by mlx-lm, refused by the embedded backend.
    "mistral_windowed": (
        "Mistral",
        {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write(path: Path, family: str, tokenizer_from: Path, dtype: str = "bfloat16") -> Path:
    """Write a random ``family`` model in its hub's form, with a tokenizer, into ``path``."""
    import torch
    import transformers

    name, extra = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**(_COMMON | extra))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Peaked logits: greedy choices that do not hang on the last bit.
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    config_file = path / "config.json"
    written = json.loads(config_file.read_text())
    # As the hub has it, and as stock mlx-lm reads it.
    written["rope_theta"] = written.pop("rope_parameters")["rope_theta"]
    written |= extra
    config_file.write_text(json.dumps(written, indent=2))
    for file in _TOKENIZER:
        if (tokenizer_from / file).exists():
            shutil.copy(tokenizer_from / file, path / file)
    return path


def write_mlx_4bit(path: Path, source: Path) -> Path:
    """Convert ``source`` as mlx-community does: stacked experts, 4 bits, group 64."""
    from mlx_lm.convert import convert

    convert(str(source), str(path), quantize=True, q_bits=4, q_group_size=64)
    return path
