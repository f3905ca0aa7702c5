"""Translations of ``config.json`` settings that a single family needs; see ``settings``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.row import SettingTranslation
from vllm_moe_compat.families.settings import (
    Section,
    computed,
    kinds_of,
    renamed_layers,
    section,
)


def _jamba_offset(config: Section, text: Section) -> bool:
    offset, period = text.get("expert_layer_offset"), text.get("expert_layer_period")
    if not isinstance(offset, int) or not isinstance(period, int) or period < 1:
        return False
    if offset < 1 or 2 * offset % period == 0:
        return False
    text["expert_layer_offset"] = -offset  # Negative, so that it is not translated twice.
    return True


JAMBA_OFFSET = SettingTranslation(
    "expert_layer_offset",
    "the offset of MoE layers is counted from the end of the period",
    _jamba_offset,
)


class Pattern(str):
    """Letters of layers; one that no layer has is found in layer 0, as in ``layers_by_module``."""

    def __new__(cls, letters: Iterable[str]) -> Pattern:
        """Join the letters."""
        return super().__new__(cls, "".join(letters))

    def index(self, letter: str, *bounds: Any) -> int:
        """Return the first layer of a kind, or 0."""
        return super().index(letter, *bounds) if letter in self else 0


def _exaone4_pattern(text: Section) -> str | None:
    kinds = text.get("layer_types")
    if not isinstance(kinds, list) or not text.get("sliding_window"):
        return None
    return Pattern("G" if kind == "full_attention" else "L" for kind in kinds)


EXAONE4_PATTERN = computed(
    "sliding_window_pattern", "a string of L and G is read", _exaone4_pattern, always=True
)


GRANITE_NOPE = computed(
    "position_embedding_type",
    "no rotary embedding is said by nope",
    lambda text: "rope" if text.get("position_embedding_type") == "rope" else "nope",
    always=True,
)
GRANITE_LAYERS = renamed_layers({"linear_attention": "mamba", "full_attention": "attention"})


def _gemma4_heads(config: Section, text: Section) -> bool:
    layers, kinds = text.get("per_layer_config"), text.get("layer_types")
    if not isinstance(layers, dict) or not isinstance(kinds, list):
        return False
    changed = False
    for index, kind in enumerate(kinds):
        own = layers.get(str(index))
        if kind != "full_attention" or not isinstance(own, dict):
            continue
        for source, target in (
            ("head_dim", "global_head_dim"),
            ("num_key_value_heads", "num_global_key_value_heads"),
        ):
            if own.get(source) is not None and text.get(target) != own[source]:
                text[target] = own[source]
                changed = True
    return changed


GEMMA4_HEADS = SettingTranslation("global_head_dim", "per_layer_config is not read", _gemma4_heads)


PHIMOE_ROPE = computed(
    "rope_scaling",
    "factors of LongRoPE are required; 1 is neutral",
    lambda text: {
        "type": "longrope",
        **dict.fromkeys(("short_factor", "long_factor", "short_mscale", "long_mscale"), 1.0),
    },
)

_NEMOTRON_KINDS = {"full_attention": "attention", "linear_attention": "mamba"}


def _nemotron_kinds(text: Section) -> list[Any] | None:
    if text.get("hybrid_override_pattern") is not None:
        return None
    kinds = kinds_of(text, "layers_block_type") or kinds_of(text, "layer_types")
    old = [_NEMOTRON_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    return old or None


NEMOTRON_KINDS = computed(
    "layers_block_type", "kinds of layers have older names", _nemotron_kinds, always=True
)
NEMOTRON_LAYERS = computed(
    "num_hidden_layers",
    "the number of layers is required beside their kinds",
    lambda text: len(kinds_of(text, "layers_block_type")) or None,
)


def _kimi_linear(config: Section, text: Section) -> bool:
    kinds = text.get("layer_types")
    if text.get("linear_attn_config") is not None or not isinstance(kinds, list):
        return False
    linear = [i + 1 for i, kind in enumerate(kinds) if kind == "linear_attention"]
    text["linear_attn_config"] = {
        "kda_layers": linear,
        "full_attn_layers": [i + 1 for i in range(len(kinds)) if i + 1 not in linear],
        "head_dim": text.get("linear_head_dim"),
        "num_heads": text.get("linear_num_heads"),
        "short_conv_kernel_size": text.get("linear_conv_kernel_dim"),
    }
    text["mla_use_nope"] = True
    return True


KIMI_LINEAR = SettingTranslation(
    "linear_attn_config",
    "linear layers are read as a list of numbers that starts at 1",
    _kimi_linear,
)


def _hunyuan_rope(config: Section, text: Section) -> bool:
    if text.get("rope_scaling") is not None:
        return False
    text["rope_scaling"] = {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}
    return True


def _hunyuan_moe(config: Section, text: Section) -> bool:
    if config.get("model_type") != "hunyuan_v1_moe":
        return False
    wanted = {
        "num_shared_expert": config.get("num_shared_expert") or 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": False,
        "cla_share_factor": 1,
    }
    changed = any(config.get(key) != value for key, value in wanted.items())
    config.update(wanted)
    return changed


HUNYUAN_MOE = SettingTranslation(
    "hunyuan_v1_moe", "the module is shared with another model", _hunyuan_moe
)


def has_llama4_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config of ``llama4_text`` has MoE layers; without, it is another module's."""
    layers = config.get("moe_layers")
    step = config.get("interleave_moe_layer_step", 1)
    return bool(layers) if isinstance(layers, list) else bool(step)


def _minicpm_rope(config: Section, text: Section) -> bool:
    if text.get("rope_scaling") is not None:
        return False
    text["rope_scaling"] = {"type": "default"}
    return True


MINICPM_ROPE = SettingTranslation("rope_scaling", "a dict is required", _minicpm_rope)


def _no_mistral4(config: Section, text: Section) -> bool:
    if text is not config and text.get("model_type") == "mistral4":
        raise UnsupportedCheckpointError(
            "config.json: model_type of text_config is 'mistral4', which the installed mlx-lm "
            "does not have; serve this model elsewhere than on MLX."
        )
    return False


NO_MISTRAL_4 = SettingTranslation("model_type", "mistral4 is not known", _no_mistral4)


def _mimo(config: Section, text: Section) -> bool:
    kinds, mlps, rope = (text.get(k) for k in ("layer_types", "mlp_layer_types", "rope_parameters"))
    if not isinstance(kinds, list) or not isinstance(mlps, list) or not isinstance(rope, dict):
        return False
    full, sliding = (section(rope.get(f"{kind}_attention")) for kind in ("full", "sliding"))
    heads = text.get("num_key_value_heads")
    said_by_class = {
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in kinds],
        "moe_layer_freq": [int(kind == "sparse") for kind in mlps],
        "sliding_window_size": text.get("sliding_window"),
        "layernorm_epsilon": text.get("rms_norm_eps"),
        "rope_theta": full.get("rope_theta"),
        "swa_rope_theta": sliding.get("rope_theta"),
        "partial_rotary_factor": full.get("partial_rotary_factor", 1.0),
    }
    if text.get("hybrid_layer_pattern") is not None:  # A release says it in the module's words.
        _agree(text, said_by_class)
        return False
    text.update(
        **said_by_class,
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        n_shared_experts=None,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        swa_num_attention_heads=text.get("num_attention_heads"),
        swa_num_key_value_heads=2 * heads if isinstance(heads, int) else None,
        swa_head_dim=text.get("head_dim"),
        swa_v_head_dim=text.get("v_head_dim"),
    )
    return True


_MIMO_WORDS = {
    "hybrid_layer_pattern": "layer_types",
    "moe_layer_freq": "mlp_layer_types",
    "sliding_window_size": "sliding_window",
    "layernorm_epsilon": "rms_norm_eps",
    "rope_theta": "rope_parameters.full_attention.rope_theta",
    "swa_rope_theta": "rope_parameters.sliding_attention.rope_theta",
    "partial_rotary_factor": "rope_parameters.full_attention.partial_rotary_factor",
}
"""Keys of the release, which transformers' class ignores → keys of the class."""


def _agree(text: Section, expected: Section) -> None:
    """Refuse keys of the release that contradict what transformers' class says without them."""
    for key, value in expected.items():
        if text.get(key) not in (None, value):
            raise UnsupportedCheckpointError(
                f"config.json: {key} is {text[key]!r}, expected {value!r}, since transformers "
                f"ignores it and reads {_MIMO_WORDS[key]}; set {_MIMO_WORDS[key]} to the same."
            )


MIMO = SettingTranslation(
    "mimo_v2_flash", "settings of sliding layers have keys of their own", _mimo
)
HUNYUAN_ROPE = SettingTranslation(
    "rope_scaling", "a dict is required; factor 1 is neutral", _hunyuan_rope
)


def _step3(config: Section, text: Section) -> bool:
    """Replace Step 3.5's config by its text section, with the keys of the first release."""
    if config.get("model_type") == "step3p5" and "attention_other_setting" in config:
        return False
    inner = dict(text)
    groups = inner.get("num_key_value_heads")
    inner |= {
        "model_type": "step3p5",
        "num_attention_groups": groups,
        "moe_num_experts": inner.get("n_routed_experts"),
        "moe_top_k": inner.get("num_experts_per_tok"),
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": inner.get("num_sliding_attention_heads"),
            "num_attention_groups": groups,
        },
        **_step3_lists(inner),
    }
    inner.pop("rope_parameters", None)
    quantization = config.get("quantization_config")
    config.clear()
    config.update(inner)
    if quantization is not None:
        config["quantization_config"] = quantization
    return True


def _step3_lists(text: Section) -> Section:
    """Return the settings that have one value per layer."""
    ropes = section(text.get("rope_parameters"))
    own = [
        section(ropes.get(kind) if isinstance(kind, str) else None) or ropes
        for kind in kinds_of(text, "layer_types")
    ]
    kinds = kinds_of(text, "mlp_layer_types")
    found: Section = {}
    if ropes and own:
        found["rope_theta"] = [rope.get("rope_theta", 1e4) for rope in own]
        found["partial_rotary_factors"] = [rope.get("partial_rotary_factor", 1.0) for rope in own]
    if kinds:
        found["moe_layers_enum"] = ",".join(str(i) for i, k in enumerate(kinds) if k == "sparse")
    return found


STEP3 = SettingTranslation(
    "step3p5", "settings of the text model are read at the top level", _step3
)
