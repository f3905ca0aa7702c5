"""What vllm-metal needs from a model that mlx-lm has loaded, as data.

Read off its sources (github.com/vllm-project/vllm-metal): ``vllm_metal/attention``
at commit 021174e947cd and ``vllm_metal/v1/model_lifecycle.py`` at commit 01a1710e,
where it walks the layers, puts a wrapper in the place of each one's attention, and
reads the rest off the attention and off the model's arguments. When it is read
again, this file is what changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The first that a layer has is what is wrapped; a layer without one is left alone.
ATTENTION_NAMES = ("self_attn", "linear_attn", "attention", "conv", "mixer")

# In each group one name is enough.
Names = tuple[str, ...]


@dataclass(frozen=True)
class Wrapper:
    """A kind of wrapper: by what it knows its layers, and what it reads from them.

    ``exempt``: what the layers of a module need not have, since vllm-metal knows.
    """

    name: str
    known_by: tuple[Names, ...]
    reads: tuple[Names, ...]
    without: Names = ()
    exempt: Mapping[str, Names] | None = None

    def accepts(self, layer: Any) -> bool:
        """Whether vllm-metal would put this wrapper around ``layer``."""
        return not any(_has(layer, name) for name in self.without) and not _lacking(
            layer, self.known_by
        )

    def lacking(self, layer: Any) -> list[str]:
        """Return the attributes that it needs and ``layer`` lacks."""
        spared = (self.exempt or {}).get(type(layer).__module__.rpartition(".")[2], ())
        return [
            " or ".join(names)
            for names in _lacking(layer, self.reads)
            if not set(names) & set(spared)
        ]


ROTATION = ("rope", "rotary_emb")
SOFTMAX = Wrapper(
    "softmax",
    known_by=(
        ("q_proj",),
        ("k_proj",),
        ("o_proj", "dense", "out_proj"),
        ("v_proj", "use_k_eq_v"),
    ),
    reads=(
        ("n_heads", "num_attention_heads", "num_heads"),
        ("n_kv_heads", "num_kv_heads", "num_key_value_heads"),
        ("scale", "sm_scale"),
        ROTATION,
    ),
    exempt={"stablelm": ("scale",), "phi": ("scale",), "nemotron_h": ROTATION},
)
PACKED = Wrapper(
    "packed softmax",
    known_by=(
        *((name,) for name in ("qkv_proj", "o_proj", "n_heads", "n_kv_heads", "head_dim", "scale")),
        ROTATION,
    ),
    reads=(),
)
LATENT = Wrapper(
    "latent",
    known_by=(("kv_a_proj_with_mqa",),),
    reads=(
        *((name,) for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim", "num_heads")),
        *((name,) for name in ("q_head_dim", "qk_nope_head_dim", "qk_rope_head_dim")),
        ("q_proj", "q_a_proj"),
        ("kv_a_layernorm",),
        ("rope",),
        ("scale", "softmax_scale"),
        ("o_proj",),
        ("embed_q", "kv_b_proj"),
        ("unembed_out", "kv_b_proj"),
    ),
)
GATED_DELTA = Wrapper(
    "gated delta",
    known_by=(("conv1d",), ("A_log",), ("in_proj_qkvz", "in_proj_qkv")),
    without=("q_proj",),
    reads=(
        ("in_proj_ba", "in_proj_a"),
        ("in_proj_ba", "in_proj_b"),
        ("in_proj_qkvz", "in_proj_z"),
        ("fix_query_key_value_ordering", "in_proj_qkv"),
        *((name,) for name in ("conv_kernel_size", "key_dim", "num_k_heads", "num_v_heads")),
        *((name,) for name in ("head_k_dim", "head_v_dim", "dt_bias", "norm", "out_proj")),
    ),
)
# LFM2's, and Mamba-2 where it is a layer's ``mixer``.
SHORT_CONVOLUTION = Wrapper(
    "short convolution",
    known_by=(("conv",), ("in_proj",), ("out_proj",), ("L_cache",)),
    without=("q_proj",),
    reads=(),
)
MAMBA2 = Wrapper("Mamba-2", known_by=(("conv1d",), ("ssm_state_size",)), reads=())
# Latent attention is looked for first: its layers have a q_proj in some models.
WRAPPERS = (LATENT, PACKED, SOFTMAX, GATED_DELTA, SHORT_CONVOLUTION, MAMBA2)
# Named like attention by Nemotron-H, which vllm-metal knows: no state, no wrapper.
STATELESS = ("NemotronHMoE", "NemotronHMLP")

# Of the model's arguments, those of the nested text config merged in.
DIMENSIONS: tuple[Names, ...] = (
    ("vocab_size",),
    ("num_hidden_layers", "n_layers"),
    ("num_attention_heads",),
    ("num_key_value_heads", "n_kv_heads", "num_attention_heads"),
    ("head_dim", "hidden_size"),
)
# And what it reads of the arguments where some layer has such a wrapper.
DIMENSIONS_OF: Mapping[str, tuple[Names, ...]] = {
    "latent": (("kv_lora_rank",),),
    "gated delta": (
        ("full_attention_interval",),
        *((f"linear_num_{side}_heads",) for side in ("key", "value")),
        *((f"linear_{side}_head_dim",) for side in ("key", "value")),
        ("linear_conv_kernel_dim",),
    ),
}
GATED_DELTA_MODELS = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")


def layers(model: Any) -> list[Any]:
    """The layers that vllm-metal finds.

    Raises:
        LookupError: it finds none, and would not start.
    """
    root = getattr(model, "language_model", model)
    for place in (getattr(root, "model", root), root):
        if hasattr(place, "layers"):
            return list(place.layers)
    raise LookupError(f"no layers in {type(model).__module__}")


def attention(layer: Any) -> Any | None:
    """Return the modules of a layer that would be wrapped."""
    return next((getattr(layer, name) for name in ATTENTION_NAMES if _has(layer, name)), None)


def arguments(model: Any) -> dict[str, Any]:
    """The model's arguments, flattened as vllm-metal does."""
    flat = dict(vars(model.args))
    nested = flat.get("text_config") or {}
    for name, value in (nested if isinstance(nested, dict) else vars(nested)).items():
        flat.setdefault(name, value)
    return flat


def unmet(model: Any) -> tuple[dict[str, int], list[str]]:
    """How many layers get which wrapper, and what is missing for that."""
    wrapped: dict[str, int] = {}
    missing: list[str] = []
    for number, layer in enumerate(layers(model)):
        inner = attention(layer)
        if inner is None or type(inner).__name__ in STATELESS:
            continue
        wrapper = next((wrapper for wrapper in WRAPPERS if wrapper.accepts(inner)), None)
        if wrapper is None:
            missing.append(f"a wrapper for layer {number}'s {type(inner).__name__}")
            continue
        wrapped[wrapper.name] = wrapped.get(wrapper.name, 0) + 1
        missing += [f"layer {number}'s {name}" for name in wrapper.lacking(inner)]
    flat = arguments(model)
    needed = [*DIMENSIONS, *(names for kind in wrapped for names in DIMENSIONS_OF.get(kind, ()))]
    for names in needed:
        if all(flat.get(name) is None for name in names):
            missing.append(f"argument {' or '.join(names)}")
    interval = flat.get("full_attention_interval")
    if "gated delta" in wrapped:
        if flat.get("model_type") not in GATED_DELTA_MODELS:
            missing.append(f"model type {flat.get('model_type')} among the gated-delta ones")
        kinds = [attention(layer) for layer in layers(model)]
        if interval and any(
            GATED_DELTA.accepts(inner) == ((i + 1) % interval == 0) for i, inner in enumerate(kinds)
        ):
            missing.append(f"softmax attention in every layer that {interval} divides")
    return wrapped, missing


def _has(module: Any, name: str) -> bool:
    return getattr(module, name, None) is not None


def _lacking(module: Any, groups: tuple[Names, ...]) -> list[Names]:
    # An attribute may be None and still be there: q_lora_rank without compression.
    return [names for names in groups if not any(hasattr(module, name) for name in names)]
