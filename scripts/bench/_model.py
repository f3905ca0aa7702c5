"""The benchmark's model: a hybrid MoE checkpoint with random weights.

Proportions are those of a Qwen3.5 MoE (three gated-delta layers to one softmax
layer, grouped queries, a shared expert), small enough that a decode step takes
tens of milliseconds on two cores. mlx-lm's own class makes the weights and
fixes their names, so the checkpoint is in the form that mlx-lm loads as it is.
There is no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import importlib
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


@dataclass(frozen=True)
class SoftmaxShape:
    """A Qwen3 MoE: softmax attention in every layer, so that a long prompt can be computed.

    On the CPU, mlx-lm computes a gated-delta layer token by token.
    """

    layers: int = 4
    hidden: int = 256
    experts: int = 16
    head_dim: int = 64
    vocab: int = 8192

    def config(self, max_length: int) -> dict[str, Any]:
        """The config.json of such a model."""
        heads = max(2, self.hidden // self.head_dim)
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "dtype": "float32",
            "eos_token_id": self.vocab - 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden,
            "max_position_embeddings": max_length,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.hidden // 2,
            "norm_topk_prob": True,
            "num_attention_heads": heads,
            "num_experts": self.experts,
            "num_experts_per_tok": min(4, self.experts),
            "num_hidden_layers": self.layers,
            "num_key_value_heads": heads // 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "vocab_size": self.vocab,
        }


def write(
    path: Path, shape: Shape | SoftmaxShape, max_length: int, seed: int = 0
) -> dict[str, Any]:
    """Write the checkpoint into ``path``; return what there is to say about it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    config = shape.config(max_length)
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    (path / "config.json").write_text(json.dumps(config, indent=2))
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    size = sum(weight.nbytes for weight in weights.values())
    linear = config.get("text_config", {}).get("layer_types", []).count("linear_attention")
    return asdict(shape) | {
        "class": module.__name__,
        "softmax_layers": shape.layers - linear,
        "gated_delta_layers": linear,
        "dtype": "float32",
        "weights_mib": round(size / 2**20, 1),
    }
