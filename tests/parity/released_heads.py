"""Random releases with a prediction head: a transformers model, and one more layer of its kind."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from parity import experts, reference
from parity.families import FAMILIES
from parity.family import Family
from parity.forms import LAYOUTS
from parity.reference import GRAIN, State
from parity.release import release_config, release_names
from parity.vllm_heads import HeadModules
from support.checkpoints import Checkpoint

_MTP = {
    "join": "mtp.fc",
    "embedding_norm": "mtp.pre_fc_norm_embedding",
    "hidden_norm": "mtp.pre_fc_norm_hidden",
    "norm": "mtp.norm",
}
_NEXTN = {
    "join": "model.layers.2.eh_proj",
    "embedding_norm": "model.layers.2.enorm",
    "hidden_norm": "model.layers.2.hnorm",
    "norm": "model.layers.2.shared_head.norm",
}


@dataclass(frozen=True)
class Head:
    """How a release names a head.

    Attributes:
        layer: beginning of the names of the decoder layer, or of all, before their numbers.
        parts: names of the rest.
        one: settings of a model of the decoder layer alone.
        count: key of the number of heads.
        says: what else the configuration says of it.
        target: settings of the target that the family has otherwise.
        own: whether the head has embeddings and an output head of its own.
        attention: attributes of the attention that no setting sets.
        renames: a beginning within the decoder layer in the target, and in the head.
    """

    layer: str
    parts: dict[str, str]
    one: dict[str, Any]
    count: str = "num_nextn_predict_layers"
    says: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    own: bool = False
    attention: dict[str, Any] = field(default_factory=dict)
    renames: tuple[str, str] = ("", "")


_FULL = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
_WINDOW = {
    "num_hidden_layers": 1,
    "layer_types": ["sliding_attention"],
    "mlp_layer_types": ["dense"],
}
_SPARSE = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
_QWEN3_5 = Head("mtp.layers.0.", _MTP, _FULL, "mtp_num_hidden_layers")
_FURTHER_LAYER = Head("model.layers.2.", _NEXTN, _SPARSE)
_ERNIE = Head(
    "model.mtp_block.0.",
    {
        "join": "model.mtp_linear_proj.0",
        "embedding_norm": "model.mtp_emb_norm.0",
        "hidden_norm": "model.mtp_hidden_norm.0",
    },
    {"num_hidden_layers": 1},
)
HEADS = {
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_next": Head("mtp.layers.0.", _MTP, _FULL),
    "deepseek_v3": _FURTHER_LAYER,
    "deepseek_v3 own": replace(_FURTHER_LAYER, own=True),
    "glm4_moe": _FURTHER_LAYER,
    "glm4_moe_lite": replace(
        _FURTHER_LAYER, one={"num_hidden_layers": 1, "mlp_layer_types": ["sparse"]}
    ),
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_moe tied": replace(_ERNIE, target={"tie_word_embeddings": True}),
    "exaone_moe": Head("mtp.layers.0.", _MTP, _WINDOW),
    # A head without a window has rotary embeddings, which such layers of the target have not.
    "exaone_moe full": Head(
        "mtp.layers.0.",
        _MTP,
        _WINDOW | {"layer_types": ["full_attention"]},
        attention={"sliding_window": None},
        says={"mtp_layer_types": ["full_attention"]},
    ),
    "exaone_moe wide": Head(
        "mtp.layers.0.",
        _MTP,
        _WINDOW | {"sliding_window": 24},
        says={"mtp_layer_types": ["sliding_attention"], "mtp_sliding_windows": [24]},
    ),
    "nemotron_h": Head(
        "mtp.layers.",
        {
            "join": "mtp.layers.0.eh_proj",
            "embedding_norm": "mtp.layers.0.enorm",
            "hidden_norm": "mtp.layers.0.hnorm",
            "norm": "mtp.layers.1.final_layernorm",
        },
        {"layers_block_type": ["attention", "moe"]},
        says={"mtp_hybrid_override_pattern": "*E"},
    ),
    "step3p7": Head(
        "model.layers.4.",
        {
            "join": "model.layers.4.eh_proj",
            "embedding_norm": "model.layers.4.enorm",
            "hidden_norm": "model.layers.4.hnorm",
            "norm": "model.layers.4.transformer.shared_head.norm",
        },
        _WINDOW,
    ),
    "mimo_v2_flash": Head(
        "model.mtp.layers.0.",
        {
            "join": "model.mtp.layers.0.eh_proj",
            "embedding_norm": "model.mtp.layers.0.enorm",
            "hidden_norm": "model.mtp.layers.0.hnorm",
            "norm": "model.mtp.layers.0.final_layernorm",
        },
        _WINDOW,
        renames=("post_attention_layernorm.", "pre_mlp_layernorm."),
    ),
}
"""Family, and a kind of head, → its releases' head."""


@dataclass(frozen=True)
class Released:
    """A release in memory, and its modules on torch."""

    family: str
    checkpoint: Checkpoint
    target: Any
    head: HeadModules

    def hidden_states(self, tokens: list[int]) -> torch.Tensor:
        """Return the target's hidden states ``[T, H]`` after its final norm."""
        found = text_model(self.target)(input_ids=torch.tensor([tokens]), use_cache=False)
        hidden: torch.Tensor = found.last_hidden_state[0]
        return hidden


def text_model(target: Any) -> Any:
    """Return the part that makes hidden states of a transformers model."""
    return getattr(target.model, "language_model", target.model)


def make(name: str) -> Released:
    """Make a release with the head ``name``, the same one in every call."""
    described, family = HEADS[name], FAMILIES[name.partition(" ")[0]]
    family = replace(family, kwargs=family.kwargs | described.target)
    target = reference.new_model(family, False, GRAIN)
    tensors, config = saved(target)
    one = reference.new_model(replace(family, kwargs=family.kwargs | described.one), False, GRAIN)
    decoder = text_model(one)
    if described.attention:
        vars(decoder.layers[0].self_attn).update(described.attention)
    modules = {"join": torch.nn.Linear(2 * 64, 64, bias=False)}
    norm = "norm_f" if hasattr(decoder, "norm_f") else "norm"
    modules |= {
        part: copy.deepcopy(getattr(decoder, norm)) for part in described.parts if part != "join"
    }
    generator = torch.Generator().manual_seed(5)  # Not the target's first layer again.
    with torch.no_grad():
        for module in (one, *modules.values()):
            for key, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(reference._values(key, tensor, GRAIN, generator, False))
    tensors = in_release(family, tensors)
    tensors |= _layer(described, in_release(family, saved(one)[0]))
    for part, stem in described.parts.items():
        tensors[f"{stem}.weight"] = modules[part].weight.detach().clone()
    config = release_config(family.base, config)
    config.get("text_config", config).update({described.count: 1} | described.says)
    setattr(decoder, norm, torch.nn.Identity())
    ends = one if described.own else target
    embed, output = ends.get_input_embeddings(), ends.get_output_embeddings()
    if described.own:
        tensors[f"{described.layer}embed_tokens.weight"] = embed.weight.detach()
        tensors[f"{described.layer}shared_head.head.weight"] = output.weight.detach()
    head = HeadModules(
        decoder=decoder,
        embed=embed,
        output=output,
        norm=modules.pop("norm", None),
        **modules,
    )
    return Released(family.name, Checkpoint(tensors, config), target, head)


def saved(model: Any) -> tuple[State, dict[str, Any]]:
    """Return the tensors and the configuration that transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        return reference._save(model, Path(folder))


def in_release(family: Family, saved: State) -> State:
    """Return the tensors as releases have them."""
    rest, layers = experts.take_experts(family.base, release_names(family.base, saved))
    for path, layer in layers.items():
        rest |= LAYOUTS["released"](family.base, path, layer)
    return rest


def _layer(described: Head, tensors: State) -> State:
    """Return the first decoder layer under the names of a head."""
    old, new = described.renames
    found = {}
    for name, value in tensors.items():
        several = described.layer.endswith(".layers.")
        _, inside, rest = name.partition(".layers." if several else ".layers.0.")
        if inside and "vis" not in name:
            found[described.layer + (rest.replace(old, new) if old else rest)] = value
    return found


def write(released: Released, folder: Path) -> Path:
    """Write the release."""
    released.checkpoint.write(folder, shards=1)
    return folder
