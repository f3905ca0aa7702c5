"""A release of Bailing's hybrid models with a prediction head.

transformers has no class for them. The target is a model of mlx-lm's, whose hidden states are
given to both sides. The head's layer has latent attention and experts as DeepSeek-V3's: that is
the oracle's, under the names of this family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from parity import families, mlx_families, reference, released_heads, test_without_transformers
from parity.available import is_installed
from parity.reference import GRAIN
from parity.vllm_heads import HeadModules
from support.checkpoints import Checkpoint
from support.loading import new_model
from vllm_moe_compat.backend.model import backbone

NAME = "bailing_hybrid"
_LAYER = "model.layers.2."
_NAMES = (
    (".self_attn.", ".attention."),
    (".o_proj.", ".dense."),
    ("gate.e_score_correction_bias", "gate.expert_bias"),
)


@dataclass(frozen=True)
class OnMlx(released_heads.Released):
    """A release whose target is a model of mlx-lm's."""

    def hidden_states(self, tokens: list[int]) -> torch.Tensor:
        """Return the target's hidden states ``[T, H]``."""
        hidden = backbone.of_model(self.target)(mx.array([tokens]))
        return torch.from_numpy(np.array(hidden[0]))


def is_there() -> bool:
    """Whether mlx-lm has the module."""
    return is_installed(NAME)


def make() -> OnMlx:
    """Make the release, the same one in every call."""
    (family,) = [one for one in mlx_families.FAMILIES if one.module == NAME]
    made = test_without_transformers.made(family)
    target: Any = new_model(made.config)
    target.load_weights(list(made.parameters.items()))
    tensors = dict(test_without_transformers.checkpoint(family, "published").tensors)
    like = families.FAMILIES["deepseek_v3"]
    settings = {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "qk_nope_head_dim": 8,
        "rms_norm_eps": 1e-6,
    }
    one = reference.new_model(replace(like, kwargs=like.kwargs | settings), False, GRAIN)
    join = torch.nn.Linear(2 * 64, 64, bias=False)
    norms = {part: torch.nn.RMSNorm(64, eps=1e-6) for part in ("enorm", "hnorm", "final_layernorm")}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in (one, join, *norms.values()):
            for key, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(reference._values(key, tensor, GRAIN, generator, False))
    saved = released_heads.in_release(like, released_heads.saved(one)[0])
    for name, value in saved.items():
        _, inside, rest = name.partition(".layers.0.")
        if inside:
            for old, new in _NAMES:
                rest = f".{rest}".replace(old, new)[1:]
            tensors[_LAYER + rest] = value
    for part, module in {"eh_proj": join, **norms}.items():
        tensors[f"{_LAYER}{part}.weight"] = module.weight.detach().clone()
    decoder = one.model
    decoder.norm = torch.nn.Identity()
    head = HeadModules(
        decoder=decoder,
        join=join,
        embedding_norm=norms["enorm"],
        hidden_norm=norms["hnorm"],
        norm=norms["final_layernorm"],
        embed=torch.nn.Embedding.from_pretrained(tensors["model.word_embeddings.weight"]),
        output=lambda states: states @ tensors["lm_head.weight"].T,
    )
    config = made.config | {"num_nextn_predict_layers": 1}
    return OnMlx(NAME, Checkpoint(tensors, config), target, head)
