"""The benchmark's model: a hybrid MoE checkpoint with random weights.

Proportions are those of a Qwen3.5 MoE (three gated-delta layers to one softmax
layer, grouped queries, a shared expert), small enough that a decode step takes
tens of milliseconds on two cores. mlx-lm's own class makes the weights and
fixes their names, so the checkpoint is in the form that mlx-lm loads as it is.
There is no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What may be chosen about the model; the rest follows from it."""

    layers: int = 8
    hidden: int = 512
    experts: int = 16
    head_dim: int = 128
    vocab: int = 8192

    def config(self, max_length: int) -> dict[str, Any]:
        """The config.json of such a model."""
        text = {
            "model_type": "qwen3_5_moe_text",
            "attention_bias": False,
            "attn_output_gate": True,
            "dtype": "float32",
            "eos_token_id": self.vocab - 1,
            "full_attention_interval": 4,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "layer_types": [
                "full_attention" if (i + 1) % 4 == 0 else "linear_attention"
                for i in range(self.layers)
            ],
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 64,
            "linear_num_key_heads": self.hidden // 128,
            "linear_num_value_heads": self.hidden // 64,
            "linear_value_head_dim": 64,
            "max_position_embeddings": max_length,
            "moe_intermediate_size": self.hidden // 2,
            "num_attention_heads": 2 * self.hidden // self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": min(4, self.experts),
            "num_hidden_layers": self.layers,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [3, 3, 2],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000,
                "rope_type": "default",
            },
            "shared_expert_intermediate_size": self.hidden // 2,
            "tie_word_embeddings": False,
            "vocab_size": self.vocab,
        }
        vision = {
            "model_type": "qwen3_5_moe",
            "depth": 1,
            "hidden_size": 32,
            "in_channels": 3,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": self.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }
        return {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "image_token_id": self.vocab - 2,
            "video_token_id": self.vocab - 3,
            "vision_start_token_id": self.vocab - 4,
            "vision_end_token_id": self.vocab - 5,
            "text_config": text,
            "vision_config": vision,
            "tie_word_embeddings": False,
        }


def write(path: Path, shape: Shape, max_length: int, seed: int = 0) -> dict[str, Any]:
    """Write the checkpoint into ``path``; return what there is to say about it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen3_5_moe import Model, ModelArgs

    config = shape.config(max_length)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    mx.random.seed(seed)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    size = sum(weight.nbytes for weight in weights.values())
    kinds = config["text_config"]["layer_types"]
    return asdict(shape) | {
        "class": Model.__module__,
        "softmax_layers": kinds.count("full_attention"),
        "gated_delta_layers": kinds.count("linear_attention"),
        "dtype": "float32",
        "weights_mib": round(size / 2**20, 1),
    }
