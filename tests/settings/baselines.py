"""Configs from which one setting at a time is changed.

Some settings act only beside others: a window that is switched on, groups of experts, the keys of
one kind of rotary embedding. A baseline sets those others, and names the settings to vary in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from settings.values import ABSENT, ORIGINAL

Path = tuple[str, ...]
Config = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """A config and the settings that are varied in it.

    ``changes`` are made to the family's tiny config; ``vary`` matches the dotted names of the
    settings to vary.
    """

    name: str
    changes: tuple[tuple[Path, Any], ...] = ()
    vary: str = ".*"

    def varies(self, path: Path) -> bool:
        return re.fullmatch(self.vary, ".".join(path)) is not None


DERIVED = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "layers_block_type")
PATTERNS = (
    r"(_?sliding_window_pattern|use_sliding_window|max_window_layers|full_attention_interval|"
    r"global_attn_every_n_layers|first_k_dense_replace|moe_layer_freq|decoder_sparse_step|"
    r"mlp_only_layers|no_rope_layer_interval|interleave_moe_layer_step|num_dense_layers|"
    r"attn_layer_\w+|expert_layer_\w+|moe_layer_\w+|sliding_window|hybrid_override_pattern|"
    r"full_attn_idxs|num_hidden_layers)"
)
NONE = "(?!)"
HEADS = ("num_attention_heads", "num_key_value_heads", "linear_num_key_heads")
HEADS += ("linear_num_value_heads", "linear_num_heads", "num_attention_heads_per_layer")
MAMBA = (("mamba_n_heads", "mamba_expand"), ("mamba_d_head", "mamba_expand"))
MAMBA += (("hidden_size", "mamba_n_heads"),)
LATENT = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
DERIVED_DIMS = ("qk_head_dim", "head_dim")
GROUPED = (
    r"(n_group|topk_group|num_expert_group|topk_method|scoring_func|norm_topk_prob|"
    r"routed_scaling_factor|num_experts_per_tok|moe_renormalize)"
)


def baselines(text: Config, plain: Config, layers: int) -> Iterator[Baseline]:
    """Yield the baselines of a family.

    Args:
        text: the language model's settings, resolved.
        plain: its section of config.json.
        layers: number of decoder layers.
    """
    # A group needs more experts than it chooses, and layers are listed under one key.
    yield Baseline("", vary="(?!(n_group|full_attn_idxs)$).*")
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        yield from _ropes(("rope_parameters",), rope, text)
    elif isinstance(rope, dict):
        for kind, own in rope.items():
            if isinstance(own, dict):
                yield from _ropes(("rope_parameters", kind), own, text)
    derived = tuple(((key,), ABSENT) for key in DERIVED if key in plain)
    window: tuple[tuple[Path, Any], ...] = ()
    if "sliding_window" in text:
        window = ((("sliding_window",), 8),)
        if "use_sliding_window" in text:
            window += ((("use_sliding_window",), True), (("max_window_layers",), 1))
        kinds: tuple[tuple[Path, Any], ...] = ()
        if _attention_only(text.get("layer_types")):
            half = (["sliding_attention", "full_attention"] * layers)[:layers]
            kinds = ((("layer_types",), half),)
        lists = "sliding_window|use_sliding_window|max_window_layers|layer_types"
        yield Baseline("window", (*window, *kinds), lists)
    if derived and "full_attn_idxs" in text:
        derived += ((("full_attn_idxs",), [layers - 1]),)
    if derived:
        yield Baseline("derived", (*derived, *window), PATTERNS)
    if "num_hidden_layers" in text:
        doubled = tuple(
            ((key,), value * 2) for key, value in text.items() if _per_layer(key, value, layers)
        )
        twice = ((("num_hidden_layers",), 2 * layers), *doubled)
        lists = r"\w*layer_types|moe_layers|layers_block_type|first_k_dense_replace|no_rope_layers"
        yield Baseline("twice the layers", twice, lists)
        if derived:
            changes = ((("num_hidden_layers",), 2 * layers), *derived, *window)
            yield Baseline("twice the layers, derived", changes, PATTERNS)
    heads = {key: 2 * text[key] for key in HEADS if isinstance(text.get(key), int)}
    yield Baseline("twice the heads", tuple(((k,), v) for k, v in heads.items()), NONE)
    if "qk_head_dim" in text:
        wider = {key: 2 * text[key] for key in LATENT} | dict.fromkeys(DERIVED_DIMS, ABSENT)
        yield Baseline("wider heads", tuple(((k,), v) for k, v in wider.items()), NONE)
    for pair in MAMBA:
        if all(isinstance(text.get(key), int) for key in pair):
            changes = tuple(((key,), 2 * text[key]) for key in pair)
            yield Baseline(f"twice {pair[0]}", changes, NONE)
    if "n_group" in text:
        groups = {"n_group": 4, "topk_group": 2}
        count = next((k for k in ("n_routed_experts", "num_experts") if k in text), None)
        changes = tuple(((k,), v) for k, v in (groups | ({count: 32} if count else {})).items())
        if "topk_method" in text:
            changes += ((("topk_method",), "group_limited_greedy"),)
        yield Baseline("groups", changes, GROUPED)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in text:
            yield Baseline(name, (((name,), 2.0),), name)


def _attention_only(kinds: Any) -> bool:
    return isinstance(kinds, list) and set(kinds) <= {"full_attention", "sliding_attention"}


def _per_layer(key: str, value: Any, layers: int) -> bool:
    return isinstance(value, list) and len(value) == layers and not key.endswith("multipliers")


def _rotary_dim(text: Config, rope: Config) -> int:
    heads = text.get("num_attention_heads") or 1
    dim = text.get("qk_rope_head_dim") or text.get("head_dim") or text["hidden_size"] // heads
    if text.get("qk_rope_head_dim"):
        return int(dim)
    return int(dim * rope.get("partial_rotary_factor", 1.0))


def _ropes(path: Path, rope: Config, text: Config) -> Iterator[Baseline]:
    """Yield one baseline per kind of rotary embedding, with the keys that it needs."""
    own_kind = text["model_type"]
    for kind, keys in rope_kinds(_rotary_dim(text, rope)).items():
        if rope["rope_type"] == kind:
            continue
        always = {"rope_theta", "partial_rotary_factor"}
        if "llama_4_scaling_beta" in rope:  # Queries are scaled whatever the kind is.
            always |= {"llama_4_scaling_beta", "original_max_position_embeddings"}
        kept = {k: v for k, v in rope.items() if k in always}
        changed = {**kept, "rope_type": kind, **keys}
        changes: tuple[tuple[Path, Any], ...] = ((path, changed),)  # ``changed`` may still grow.
        vary = rf"{re.escape('.'.join(path))}\.(?!rope_theta)\w+"
        if kind in ("dynamic", "longrope"):
            vary += "|max_position_embeddings"
        if kind == "dynamic":
            changes += ((("max_position_embeddings",), ORIGINAL),)
        if kind == "longrope" and own_kind.startswith("phi"):
            changes += ((("original_max_position_embeddings",), ORIGINAL),)
            changed |= {"short_mscale": 1.2, "long_mscale": 1.3}
        if kind == "longrope" and own_kind == "phimoe":
            # transformers' Phi-MoE takes the short factors at any length, against its release.
            changed["short_factor"] = changed["long_factor"]
            vary = vary.replace("(?!rope_theta)", "(?!rope_theta|(short|long)_factor|original)")
        yield Baseline(f"{'.'.join(path)} {kind}", changes, vary)
        if kind == "yarn":  # transformers takes the two together or none.
            both = {**changed, "mscale": 0.7, "mscale_all_dim": 1.0}
            vary = rf"{re.escape('.'.join(path))}\.mscale\w*"
            yield Baseline(f"{'.'.join(path)} yarn with mscale", ((path, both),), vary)


def rope_kinds(dim: int) -> dict[str, Config]:
    """Return the kinds of rotary embedding with required and optional keys."""
    half = dim // 2
    original = {"original_max_position_embeddings": ORIGINAL}
    return {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
        "longrope": {
            "short_factor": [1.0 + 0.1 * i for i in range(half)],
            "long_factor": [2.0 + 0.1 * i for i in range(half)],
            **original,
            "factor": 32.0,
        },
        "proportional": {},
    }


OPTIONAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "yarn": {
        "attention_factor": (0.7, 1.3),
        "mscale": (0.7, 1.0),
        "mscale_all_dim": (0.7, 1.0),
        "truncate": (False, True),
        "llama_4_scaling_beta": (0.1,),
        "beta_fast": (8.0,),
        "beta_slow": (4.0,),
    },
    "longrope": {"attention_factor": (0.7, 1.3), "short_mscale": (1.2,), "long_mscale": (1.3,)},
    "default": {"partial_rotary_factor": (0.5, 1.0)},
}
"""Keys that a kind may also have, and values for them."""
