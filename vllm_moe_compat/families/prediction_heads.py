"""The multi-token-prediction heads of releases: their names, their order, their kind of layer.

mlx-lm's modules drop them, so each is described here: which tensors norm and join the token's
embedding and the target's hidden state, where the decoder layer is, and which settings make a
model of that one layer. The facts are those of vLLM's ``model_executor/models/*_mtp.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COUNT_KEYS = (
    "mtp_num_hidden_layers",
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "n_mtp_layers",
)
"""Keys of ``config.json`` for the number of heads."""

PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "hybrid_layer_pattern",
    "moe_layer_freq",
    "is_moe_layer",
    "indexer_types",
    "swiglu_limits",
    "swiglu_limits_shared",
    "rope_theta",
    "partial_rotary_factors",
    "use_rope_layers",
)
"""Settings that are lists with an entry per layer."""

JOIN, EMBEDDING_NORM, HIDDEN_NORM = "join", "embedding_norm", "hidden_norm"
NORM, EMBEDDING, OUTPUT = "norm", "embedding", "output"


@dataclass(frozen=True, slots=True)
class PredictionHead:
    """How a family's releases store a prediction head, and what it computes.

    Names are beginnings. ``{root}`` stands for what precedes the decoder layers, or nothing;
    ``{index}`` for the head's number, from 0; ``{number}`` for the same, counted on from the
    target's layers.

    Attributes:
        layer: beginning of the names in the decoder layer.
        parts: part → name of its module. Names that no part has are the decoder layer's.
        own: beginning of all names of a head; empty for the beginnings above.
        renames: pairs of beginnings within the decoder layer: the head's, and the target's.
        always: settings of a model of that one layer.
        sparse: such settings if the layer has routed experts.
        dense: such settings if it has none.
        attention: name of the attention in the layer.
        final_norm: name of the target's final norm.
        layers: decoder layers of a head. Where there are several, ``layer`` stands before their
            numbers.
        spare: layers of the model after that one, which are left out once it is made. Some
            modules expect layers of every kind.
        indices: attributes of the part with the layers that tell which layer's cache a mask is
            made by, and their values for the one layer.
        attention_has: attributes of the layer's attention, and their values.
        embedding_first: whether the embedding comes first where both are concatenated.
        masks_first: whether the embedding at position 0 of a sequence counts as zeros.
        recycles_normed: whether the next draft starts from the normed result.
    """

    layer: str
    parts: Mapping[str, str]
    own: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    always: Mapping[str, Any] = field(default_factory=dict)
    sparse: Mapping[str, Any] = field(default_factory=dict)
    dense: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "self_attn"
    final_norm: str = "norm"
    layers: int = 1
    spare: int = 0
    indices: Mapping[str, int | None] = field(default_factory=dict)
    attention_has: Mapping[str, Any] = field(default_factory=dict)
    embedding_first: bool = True
    masks_first: bool = False
    recycles_normed: bool = True


def _beside(attention: Mapping[str, Any], **fields: Any) -> PredictionHead:
    """Return a head of its own under ``mtp``, as Qwen's."""
    return PredictionHead(
        layer="{root}mtp.layers.{index}.",
        own="{root}mtp.",
        parts={
            JOIN: "{root}mtp.fc",
            EMBEDDING_NORM: "{root}mtp.pre_fc_norm_embedding",
            HIDDEN_NORM: "{root}mtp.pre_fc_norm_hidden",
            NORM: "{root}mtp.norm",
            EMBEDDING: "{root}mtp.embed_tokens",
            OUTPUT: "{root}mtp.lm_head",
        },
        always=attention,
        **fields,
    )


def _further_layer(**fields: Any) -> PredictionHead:
    """Return a head that is one more decoder layer, as DeepSeek's."""
    return PredictionHead(
        layer="{root}layers.{number}.",
        parts={
            JOIN: "{root}layers.{number}.eh_proj",
            EMBEDDING_NORM: "{root}layers.{number}.enorm",
            HIDDEN_NORM: "{root}layers.{number}.hnorm",
            NORM: "{root}layers.{number}.shared_head.norm",
            EMBEDDING: "{root}layers.{number}.embed_tokens",
            OUTPUT: "{root}layers.{number}.shared_head.head",
        },
        sparse={"first_k_dense_replace": 0, "mlp_layer_types": ["sparse"]},
        dense={"first_k_dense_replace": 1, "mlp_layer_types": ["dense"]},
        masks_first=True,
        **fields,
    )


_FULL = {"layer_types": ["full_attention"], "full_attention_interval": 1}
_SOFTMAX_ALONE: Mapping[str, int | None] = {"fa_idx": 0, "ssm_idx": None}
_QWEN = _beside(_FULL, indices=_SOFTMAX_ALONE)
_DEEPSEEK = _further_layer()

HEADS_BY_MODULE: Mapping[str, PredictionHead] = {
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_next": _beside(
        _FULL,
        indices=_SOFTMAX_ALONE,
        sparse={"mlp_only_layers": [], "decoder_sparse_step": 1},
        dense={"mlp_only_layers": [0]},
    ),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK,
    "kimi_k25": _DEEPSEEK,
    "glm4_moe": _further_layer(recycles_normed=False),
    "glm4_moe_lite": _further_layer(recycles_normed=False),
    "bailing_hybrid": PredictionHead(
        layer="{root}layers.{number}.",
        parts={
            JOIN: "{root}layers.{number}.eh_proj",
            EMBEDDING_NORM: "{root}layers.{number}.enorm",
            HIDDEN_NORM: "{root}layers.{number}.hnorm",
            NORM: "{root}layers.{number}.final_layernorm",
            EMBEDDING: "{root}layers.{number}.word_embeddings",
            OUTPUT: "{root}layers.{number}.shared_head.head",
        },
        sparse={"first_k_dense_replace": 0},
        dense={"first_k_dense_replace": 1},
        attention="attention",
        masks_first=True,
    ),
    # A dense layer with a sliding window; the module looks for a layer of either kind.
    "mimo_v2_flash": PredictionHead(
        layer="{root}mtp.layers.{index}.",
        parts={
            JOIN: "{root}mtp.layers.{index}.eh_proj",
            EMBEDDING_NORM: "{root}mtp.layers.{index}.enorm",
            HIDDEN_NORM: "{root}mtp.layers.{index}.hnorm",
            NORM: "{root}mtp.layers.{index}.final_layernorm",
        },
        renames=(("pre_mlp_layernorm.", "post_attention_layernorm."),),
        always={
            "hybrid_layer_pattern": [1, 0],
            "layer_types": ["sliding_attention", "full_attention"],
            "moe_layer_freq": [0, 0],
            "mlp_layer_types": ["dense", "dense"],
        },
        spare=1,
        indices={"ga_idx": 0, "swa_idx": 0},
    ),
    # A dense layer, and no norm of the result.
    "ernie4_5_moe": PredictionHead(
        layer="{root}mtp_block.{index}.",
        parts={
            JOIN: "{root}mtp_linear_proj.{index}",
            EMBEDDING_NORM: "{root}mtp_emb_norm.{index}",
            HIDDEN_NORM: "{root}mtp_hidden_norm.{index}",
        },
        dense={"moe_layer_start_index": 1, "moe_layer_end_index": 1},
        sparse={"moe_layer_start_index": 0, "moe_layer_end_index": 0, "moe_layer_interval": 1},
        masks_first=True,
    ),
    # A dense layer of the kind of the target's first one. It has rotary embeddings, which layers
    # of the target without a window have not.
    "exaone_moe": _beside(
        {},
        attention_has={"use_rope": True},
        dense={"first_k_dense_replace": 1, "mlp_layer_types": ["dense"], "is_moe_layer": [False]},
    ),
    # A layer of attention and one of experts.
    # A dense layer with a sliding window; each head has an output head of its own.
    "step3p5": PredictionHead(
        layer="{root}layers.{number}.",
        parts={
            JOIN: "{root}layers.{number}.eh_proj",
            EMBEDDING_NORM: "{root}layers.{number}.enorm",
            HIDDEN_NORM: "{root}layers.{number}.hnorm",
            NORM: "{root}layers.{number}.transformer.shared_head.norm",
            OUTPUT: "{root}layers.{number}.transformer.shared_head.output",
        },
        sparse={"moe_layers_enum": "0", "mlp_layer_types": ["sparse"]},
        dense={"moe_layers_enum": "1", "mlp_layer_types": ["dense"]},
        recycles_normed=False,
    ),
    # A layer of sparse attention with experts, whatever the target's kinds are.
    "minimax_m3_vl": PredictionHead(
        layer="{root}mtp.layers.{index}.transformer_layer.",
        own="{root}mtp.",
        parts={
            JOIN: "{root}mtp.layers.{index}.eh_proj",
            EMBEDDING_NORM: "{root}mtp.layers.{index}.enorm",
            HIDDEN_NORM: "{root}mtp.layers.{index}.hnorm",
            NORM: "{root}mtp.layers.{index}.final_layernorm",
        },
        sparse={"mlp_layer_types": ["sparse"], "moe_layer_freq": [1]},
        dense={"mlp_layer_types": ["dense"], "moe_layer_freq": [0]},
        masks_first=True,
        recycles_normed=False,
    ),
    "nemotron_h": PredictionHead(
        layer="{root}mtp.layers.",
        own="{root}mtp.",
        parts={
            JOIN: "{root}mtp.layers.0.eh_proj",
            EMBEDDING_NORM: "{root}mtp.layers.0.enorm",
            HIDDEN_NORM: "{root}mtp.layers.0.hnorm",
            NORM: "{root}mtp.layers.1.final_layernorm",
        },
        always={
            "hybrid_override_pattern": "*E",
            "layers_block_type": ["attention", "moe"],
            "layer_types": ["full_attention", "moe"],
        },
        layers=2,
        attention="mixer",
        final_norm="norm_f",
        # No cache is asked for the mask of Mamba layers, of which there are none.
        indices={"fa_idx": 0, "ssm_idx": -1},
    ),
}
"""Module of ``mlx_lm.models`` → its releases' prediction heads."""
