"""The form of an entry in the tables of families, and settings that entries share."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

THETA = 30000.0  # nobody's default, so that a lost rope_theta shows
VOCAB = 96
EPS = 1e-6  # what some mlx-lm modules fix, whatever the configuration says
ROPE = {"rope_type": "default", "rope_theta": THETA}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_parameters": ROPE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "head_dim": 32,
}
PARTIAL_ROPE = ROPE | {"partial_rotary_factor": 0.5}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
# Where no dimension divides by a block: 72 = 2 * 32 + 8, 40 = 32 + 8.
RAGGED = {64: 72, 96: 40, 32: 40, 128: 104}
WIDTHS = {
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "dense_intermediate_size",
    "intermediate_size_mlp",
    "share_expert_dim",
    "q_lora_rank",
    "kv_lora_rank",
}
LINEAR = ["linear_attention", "full_attention"]
WINDOW = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """One family: its mlx-lm module and the transformers model it is held against.

    ``classes`` are the names of the configuration and of the model in transformers.
    ``outer`` is set where the configuration nests the text model's: ``kwargs`` then
    goes into ``text_config`` and ``outer`` around it. Values of ``...`` remove what
    ``COMMON`` says. ``ragged`` changes ``kwargs`` at the size where no dimension
    divides by an FP8 block. ``mtp`` is the prefix under which releases carry the
    layer that predicts further tokens. ``forms``, if any, are the only ones it is in.
    ``oracle`` is text of transformers' modeling file without which its model is another one.
    """

    name: str
    module: str
    classes: tuple[str, str]
    kwargs: dict[str, Any] = field(default_factory=dict)
    outer: dict[str, Any] | None = None
    ragged: dict[str, Any] = field(default_factory=dict)
    mtp: str = ""
    forms: tuple[str, ...] = ()
    tolerance: float = 1e-5
    note: str = ""
    oracle: str = ""

    @property
    def base(self) -> str:
        """The family's part of a variant's name, "family variant"."""
        return self.name.partition(" ")[0]

    def settings(self, ragged: bool = False) -> dict[str, Any]:
        """Return the arguments of the configuration class."""
        inner = {k: v for k, v in (COMMON | self.kwargs).items() if v is not ...}
        outer = dict(self.outer or {})
        if ragged:
            inner |= {k: RAGGED[v] for k, v in inner.items() if k in WIDTHS and v in RAGGED}
            inner |= self.ragged
        if self.outer is None:
            return deepcopy(inner)  # some configuration classes write into their arguments
        return deepcopy({"text_config": inner, "tie_word_embeddings": False} | outer)


def causal(name: str, module: str, stem: str, **kwargs: Any) -> Family:
    """Return a family whose classes are ``{stem}Config`` and ``{stem}ForCausalLM``."""
    named = ("ragged", "mtp", "forms", "tolerance", "note", "oracle")
    own = {k: kwargs.pop(k) for k in named if k in kwargs}
    return Family(name, module, (f"{stem}Config", f"{stem}ForCausalLM"), kwargs, **own)
