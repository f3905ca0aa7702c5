"""Which mlx-lm modules the package serves, and what each of them expects.

``TRANSFORMS_BY_MODULE`` is explicit: a module that is not in it is never touched. A
row says in the field's words where the module's experts live, what they are called
and what it ignores. Dense rows get FP8 only; MoE rows get FP8 plus stacking. What
upstream gets right by itself is what ``Moe.reads`` and ``Row.digests`` say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.families import forward_fixes as repairs
from vllm_moe_compat.families import settings as cfg
from vllm_moe_compat.families import settings_by_family as own
from vllm_moe_compat.families import workarounds as w
from vllm_moe_compat.families.row import (
    COMBINED,
    GLU,
    PER_EXPERT,
    TRANSPOSED,
    W123,
    Cache,
    Moe,
    NormShift,
    Row,
    Workaround,
)

_MOE = (w.FP8, w.OTHER_LAYOUTS)
_FP8_128 = (w.FP8_FORMS, w.OTHER_LAYOUTS)
_ROPE = (cfg.ROPE,)
_INT4 = ("compressed-tensors int4",)

STANDARD = Moe()
PLAIN = Moe(target="mlp.experts")
COMBINED_ONLY = Moe(stacks=(COMBINED,))
BLOCK_SPARSE = Moe(
    sources=("block_sparse_moe.experts", "mlp.experts"),
    target="block_sparse_moe.switch_mlp",
    spelling=W123,
)
GRANITE = Moe(
    sources=("block_sparse_moe", "block_sparse_moe.experts"),
    target="block_sparse_moe.switch_mlp",
    stacks=(COMBINED,),
    spelling=("input_linear", "output_linear"),
)
MISTRAL_4 = Moe(stacks=(PER_EXPERT, COMBINED))
GEMMA_4 = Moe(sources=("experts", "moe", ""), target="experts.switch_glu", stacks=(COMBINED,))

BEYOND = Extras(beyond_layers=True)
QWEN_VISION = Extras(prefixes=("vision_tower", "model.visual"), parts=("mtp.",))
NESTED_VISION = Extras(prefixes=("model.language_model.visual.", "language_model.visual."))
KIMI_VISION = Extras(
    prefixes=("vision_tower", "vision_model", "multi_modal_projector", "mm_projector")
)
GEMMA_VISION = Extras(
    prefixes=tuple(
        prefix + tower
        for prefix in ("", "model.")
        for tower in (
            "vision_tower",
            "multi_modal_projector",
            "audio_tower",
            "embed_audio",
            "embed_vision",
            "vision_embedder",
        )
    )
)
MISTRAL_VISION = Extras(parts=("vision_tower", "multi_modal_projector"))
LLAMA_VISION = Extras(parts=("vision_model", "multi_modal_projector"))
QWEN_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)
LIFTED = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
)
BLOCK_NAMES = ((r"\.mlp\.", ".block_sparse_moe."),)


def _row(module: str, *workarounds: Workaround, **fields: Any) -> Row:
    if fields.get("translations"):
        workarounds += (w.CONFIG,)
    if fields.get("renames") or fields.get("splits"):
        workarounds += (w.NAMES,)
    return Row(f"mlx_lm.models.{module}", workarounds=workarounds, **fields)


def _moe(module: str, moe: Moe = STANDARD, *more: Workaround, **fields: Any) -> Row:
    """A family whose own ``sanitize`` takes the release's layout, unquantised."""
    return _row(module, *_MOE, *more, moe=moe, **fields)


def _deepseek(module: str, moe: Moe = STANDARD, *more: Workaround, **fields: Any) -> Row:
    """A family whose own ``sanitize`` multiplies 128x128 blocks out."""
    fields.setdefault("digests", ("fp8 block 128",))
    return _row(module, *_FP8_128, *more, moe=moe, **fields)


_MOE_ROWS = (
    _row(
        "qwen3_5",
        w.FP8,
        w.NESTED_VISION,
        w.NORM_SHIFT,
        w.NORM_MARK,
        dropped_upstream=QWEN_VISION,
        dropped_here=NESTED_VISION,
        norm_shift=NormShift(QWEN_NORMS, "conv1d"),
        model_types=("qwen3_5_text",),
        translations=(cfg.ATTENTION_INTERVAL,),
    ),
    _row(
        "qwen3_5_moe",
        w.FP8,
        w.STACK_EXPERTS,
        w.NESTED_VISION,
        w.NORM_SHIFT,
        w.NORM_MARK,
        moe=COMBINED_ONLY,
        dropped_upstream=QWEN_VISION,
        dropped_here=NESTED_VISION,
        norm_shift=NormShift(QWEN_NORMS, "conv1d"),
        model_types=("qwen3_5_moe_text",),
        translations=(cfg.ATTENTION_INTERVAL,),
    ),
    _moe(
        "qwen3_next",
        STANDARD,
        w.NORM_SHIFT,
        w.EARLY_RETURN,
        dropped_upstream=Extras(parts=("mtp.",)),
        norm_shift=NormShift(QWEN_NORMS, "per-expert"),
        translations=(cfg.ROPE, cfg.ATTENTION_INTERVAL),
    ),
    _moe("qwen2_moe", translations=(cfg.ALL_SPARSE, cfg.ROPE)),
    _moe("qwen3_moe", translations=(cfg.ROPE, cfg.NUM_EXPERTS)),
    _moe(
        "qwen3_vl_moe",
        Moe(stacks=(TRANSPOSED,), transposed=True),
        w.TIED_HEAD,
        dropped_upstream=Extras(prefixes=("visual", "model.visual", "vision_tower")),
        translations=(cfg.ROPE, cfg.NUM_EXPERTS, cfg.NORM_TOPK),
        sanitize_wrapper=repairs.tied_head,
    ),
    _moe("olmoe", translations=_ROPE),
    _moe("mixtral", BLOCK_SPARSE, renames=BLOCK_NAMES, translations=_ROPE),
    _moe(
        "phimoe",
        BLOCK_SPARSE,
        renames=(*BLOCK_NAMES, (r"\.router\.weight$", ".gate.weight")),
        translations=_ROPE,
    ),
    _row(
        "gpt_oss",
        w.FP8,
        w.GPT_OSS_BF16,
        moe=Moe(target="mlp.experts", stacks=(), transposed=True, interleaved=True),
        keeps=("mxfp4 blocks",),
        translations=_ROPE,
    ),
    _moe(
        "llama4",
        Moe(
            sources=("feed_forward.experts",),
            target="feed_forward.experts",
            stacks=(TRANSPOSED,),
            transposed=True,
        ),
        dropped_upstream=LLAMA_VISION,
        translations=_ROPE,
    ),
    _moe(
        "gemma4",
        GEMMA_4,
        dropped_upstream=GEMMA_VISION,
        translations=(own.GEMMA4_HEADS, cfg.VOCAB_SIZE),
    ),
    _moe("gemma4_text", GEMMA_4, translations=(own.GEMMA4_HEADS,)),
    _moe(
        "granitemoe",
        GRANITE,
        renames=((r"(block_sparse_moe\.router)\.weight$", r"\1.layer.weight"),),
        translations=_ROPE,
    ),
    _moe(
        "granitemoehybrid",
        GRANITE,
        renames=((r"(block_sparse_moe\.router)\.weight$", r"\1.layer.weight"),),
        translations=(own.GRANITE_LAYERS,),
    ),
    _moe(
        "jamba",
        Moe(sources=("feed_forward.experts",), target="feed_forward.switch_mlp"),
        w.JAMBA_ROUTER,
        translations=(own.JAMBA_OFFSET,),
        sanitize_wrapper=repairs.jamba_router,
    ),
    _moe(
        "lfm2_moe",
        Moe(
            sources=("feed_forward.experts",),
            target="feed_forward.switch_mlp",
            spelling=(*W123, *GLU),
        ),
    ),
    _moe(
        "nemotron_h",
        Moe(
            sources=("mixer.experts",),
            target="mixer.switch_mlp",
            projections=(("up", "fc1"), ("down", "fc2")),
        ),
        dropped_upstream=Extras(prefixes=("mtp.",)),
        renames=((r"^model\.", "backbone."),),
    ),
    _moe("deepseek"),
    _moe(
        "deepseek_v2",
        translations=(cfg.ROPE, cfg.DEEPSEEK_V2_YARN),
        cache=Cache(expands_latent=True),
    ),
    _deepseek(
        "deepseek_v3",
        STANDARD,
        w.LAYER_61,
        keeps=_INT4,
        dropped_here=BEYOND,
        translations=_ROPE,
        sanitize_wrapper=repairs.layer_61,
    ),
    _deepseek("deepseek_v32", dropped_upstream=BEYOND, translations=(cfg.ROPE, cfg.FIRST_DENSE)),
    _deepseek("glm_moe_dsa", dropped_upstream=BEYOND, translations=(cfg.GLM_DSA, cfg.FIRST_DENSE)),
    _row("deepseek_v41", keeps=("fp8", "mxfp4 blocks")),
    _deepseek(
        "kimi_k25",
        STANDARD,
        w.LAYER_61,
        keeps=_INT4,
        dropped_upstream=KIMI_VISION,
        dropped_here=BEYOND | Extras(prefixes=("model.vision_tower", "model.mm_projector")),
        renames=(*LIFTED, (r"^language_model\.model\.blocks\.", "language_model.model.layers.")),
        translations=_ROPE,
        sanitize_wrapper=repairs.layer_61,
    ),
    _moe(
        "kimi_vl",
        STANDARD,
        w.LATENT,
        dropped_upstream=Extras(parts=("vision_tower", "rotary_emb", "multi_modal_projector")),
        latent=True,
        translations=_ROPE,
    ),
    _moe(
        "kimi_linear",
        Moe(sources=("block_sparse_moe.experts", "mlp.experts"), spelling=W123),
        dropped_upstream=Extras(prefixes=("model.mtp",)),
        renames=(
            (r"\.self_attn\.forget_gate\.", ".self_attn."),
            (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.e_score_correction_bias"),
            (r"\.block_sparse_moe\.((?:gate|up|down)_proj)\.", r".mlp.\1."),
        ),
        splits=(
            (
                ".self_attn.conv1d.weight",
                tuple(f".self_attn.{p}_conv1d.weight" for p in "qkv"),
            ),
        ),
        translations=(cfg.FIRST_DENSE, own.KIMI_LINEAR),
    ),
    _moe(
        "kimi_k3",
        Moe(sources=("block_sparse_moe.experts",), spelling=W123),
        keeps=("compressed-tensors",),
        dropped_upstream=KIMI_VISION | BEYOND | Extras(prefixes=("model.mtp", "mtp")),
    ),
    _moe("glm4_moe", dropped_upstream=BEYOND, translations=_ROPE),
    _moe("solar_open", dropped_upstream=BEYOND, translations=(cfg.ROPE, cfg.SOLAR)),
    _moe("glm4_moe_lite", dropped_upstream=BEYOND, translations=(cfg.ROPE, cfg.FIRST_DENSE)),
    _moe("dots1", PLAIN, translations=_ROPE),
    _moe(
        "ernie4_5_moe",
        STANDARD,
        w.ERNIE_BIAS,
        dropped_upstream=Extras(
            parts=("mtp_block.", "mtp_linear_proj.", "mtp_hidden_norm.", "mtp_emb_norm.")
        ),
        renames=((r"\.gate\.moe_statics\.", ".moe_statics."),),
        translations=_ROPE,
        sanitize_wrapper=repairs.ernie_bias,
    ),
    _deepseek("minimax", BLOCK_SPARSE, renames=BLOCK_NAMES, translations=(cfg.ROPE, *cfg.MINIMAX)),
    _moe(
        "minimax_m3_vl",
        BLOCK_SPARSE,
        keeps=("fp8 mx",),
        dropped_upstream=Extras(
            prefixes=("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
        ),
        dropped_here=Extras(prefixes=("model.vision_tower.", "model.multi_modal_projector.")),
        renames=(
            *LIFTED,
            (r"\.mlp\.gate\.e_score_correction_bias$", ".block_sparse_moe.e_score_correction_bias"),
            (r"\.mlp\.(gate|shared_experts)\.", r".block_sparse_moe.\1."),
            (r"\.indexer\.([qk])_", r".index_\1_"),
        ),
        splits=(
            (
                ".mlp.gate_up_proj.weight",
                (".mlp.gate_proj.weight", ".mlp.up_proj.weight"),
            ),
            (
                ".shared_experts.gate_up_proj.weight",
                (".shared_experts.gate_proj.weight", ".shared_experts.up_proj.weight"),
            ),
        ),
    ),
    *(
        _moe(
            module,
            dropped_upstream=Extras(prefixes=("model.mtp",)),
            dropped_here=Extras(beyond_experts=True),
            translations=(cfg.ROPE, cfg.LONGCAT),
            cache=Cache(attentions=2),
        )
        for module in ("longcat_flash", "longcat_flash_ngram")
    ),
    _moe("afmoe", PLAIN, translations=_ROPE),
    _moe("Klear", PLAIN),
    _moe(
        "exaone_moe", dropped_upstream=Extras(prefixes=("mtp.",)), translations=(cfg.IS_MOE_LAYER,)
    ),
    _moe(
        "hunyuan",
        STANDARD,
        w.HUNYUAN_ROUTER,
        translations=(own.HUNYUAN_MOE, cfg.ROPE, own.HUNYUAN_ROPE),
        sanitize_wrapper=repairs.hunyuan_weights,
    ),
    _moe("laguna", renames=((r"\.shared_experts\.", ".shared_expert."),)),
    _moe("mellum", translations=(cfg.NUM_EXPERTS,)),
    _deepseek("mistral4", MISTRAL_4, digests=("fp8 block 128", "fp8 tensor"), keeps=_INT4),
    _deepseek(
        "mimo_v2_flash",
        dropped_here=Extras(prefixes=("model.mtp",)),
        renames=((r"\.self_attn\.sinks$", ".self_attn.attention_sink_bias"),),
        translations=(own.MIMO,),
    ),
    _moe("bailing_hybrid", dropped_upstream=BEYOND),
    _moe("bailing_moe"),
    _moe("bailing_moe_linear"),
    _moe("bailing_moe_v3", dropped_upstream=BEYOND | Extras(parts=("mtp.",))),
    _moe("muse_spark", Moe(target="mlp.experts", stacks=(COMBINED,)), keeps=("nvfp4",)),
    _moe(
        "phixtral",
        Moe(
            sources=("moe.mlp",),
            target="moe.switch_mlp",
            spelling=("fc1", "fc2"),
            projections=(("up", "fc1"), ("down", "fc2")),
        ),
    ),
    _moe(
        "step3p5",
        Moe(sources=("moe", "moe.experts", "mlp.experts"), stacks=()),
        w.NORM_SHIFT,
        dropped_upstream=BEYOND | Extras(parts=(".mtp",)),
        dropped_here=Extras(
            prefixes=tuple(
                prefix + tower
                for prefix in ("", "model.")
                for tower in ("vision_model.", "vit_large_projector.", "multi_modal_projector.")
            )
        ),
        renames=(
            (r"^model\.language_model\.", "model."),
            (r"\.mlp\.gate\.weight$", ".moe.gate.weight"),
            (r"\.mlp\.gate\.e_score_correction_bias$", ".moe.router_bias"),
            (r"\.mlp\.shared_experts\.", ".share_expert."),
        ),
        norm_shift=NormShift(("norm.weight",), "router"),
        model_types=("step3p7",),
        translations=(own.STEP3,),
    ),
)

_DENSE_ROWS = (
    *(_row(m, w.FP8, translations=_ROPE) for m in ("llama", "qwen2", "olmo2", "phi3", "seed_oss")),
    *(_row(m, w.FP8, translations=_ROPE) for m in ("smollm3", "nemotron", "granite", "glm4")),
    *(_row(m, w.FP8, translations=_ROPE) for m in ("stablelm", "ernie4_5", "starcoder2")),
    _row("gemma2", w.FP8, translations=_ROPE, cache=Cache(ignores_window=True)),
    *(_row(m, w.FP8) for m in ("qwen3", "youtu_llm")),
    _row(
        "qwen3_vl",
        w.FP8,
        dropped_upstream=Extras(prefixes=("visual", "model.visual", "vision_tower")),
    ),
    _row("olmo3", w.FP8, translations=(own.OLMO3_ROPE,)),
    _row(
        "minicpm3",
        w.FP8,
        translations=(cfg.ROPE, own.MINICPM_ROPE),
        cache=Cache(expands_latent=True),
    ),
    _row(
        "muse_glimmer",
        w.FP8,
        dropped_here=Extras(
            prefixes=("model.vision_tower.", "model.vision_adapter.", "model.vision_projection.")
        ),
    ),
    _row("ministral3", w.MINISTRAL_FP8),
    _row(
        "mistral3", w.MINISTRAL_FP8, w.OTHER_LAYOUTS, moe=MISTRAL_4, dropped_upstream=MISTRAL_VISION
    ),
    _row("exaone4", w.FP8, translations=(cfg.ROPE, cfg.HEAD_DIM, own.EXAONE4_PATTERN)),
    _row("cohere2", w.FP8, translations=(cfg.ROPE, cfg.WINDOW_PATTERN)),
    _row("hunyuan_v1_dense", w.FP8, translations=(cfg.ROPE, own.HUNYUAN_ROPE)),
    _row("lfm2", w.FP8, translations=(cfg.BLOCK_DIM,)),
    _row("falcon_h1", w.FP8, translations=(cfg.ROPE, cfg.HEAD_DIM)),
    _row("apertus", w.FP8, translations=(cfg.ROPE, cfg.APERTUS)),
    _row("gemma3_text", w.FP8, translations=(own.GEMMA3_ROPE, cfg.WINDOW_PATTERN)),
    _row(
        "gemma3",
        w.FP8,
        dropped_upstream=Extras(prefixes=("vision_tower", "multi_modal_projector")),
        dropped_here=Extras(prefixes=("model.vision_tower", "model.multi_modal_projector")),
        renames=LIFTED,
        translations=(own.GEMMA3_ROPE, cfg.WINDOW_PATTERN, cfg.VOCAB_SIZE),
    ),
    _row(
        "olmo_hybrid",
        w.FP8,
        renames=(
            (r"\.attention_layer_norm\.", ".input_layernorm."),
            (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
        ),
        splits=(
            (
                ".linear_attn.conv1d.weight",
                tuple(f".linear_attn.{p}_conv1d.weight" for p in "qkv"),
            ),
        ),
    ),
)

TRANSFORMS_BY_MODULE: dict[str, Row] = {row.module: row for row in (*_MOE_ROWS, *_DENSE_ROWS)}

_BY_MODEL_TYPE = {name: row for row in TRANSFORMS_BY_MODULE.values() for name in row.model_types}
_BY_MODEL_TYPE["hunyuan_v1_moe"] = TRANSFORMS_BY_MODULE["mlx_lm.models.hunyuan"]


def row_for(model_class: type) -> Row | None:
    """Return the row that covers the class's ``sanitize``, or None.

    A class that inherits its ``sanitize`` is covered by its parent's row; one
    that overrides it is covered by a row of its own or not at all.
    """
    for ancestor in model_class.__mro__:
        row = TRANSFORMS_BY_MODULE.get(ancestor.__module__)
        if row is not None and ancestor.__name__ == "Model":
            return row
        if "sanitize" in ancestor.__dict__:
            return None
    return None


def row_of_config(config: Mapping[str, Any], remapping: Mapping[str, str]) -> Row | None:
    """Return the row whose module a config asks for, or None.

    Args:
        config: the checkpoint's.
        remapping: mlx-lm's own table of model types that share a module.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    if kind in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[kind]
    return TRANSFORMS_BY_MODULE.get(f"mlx_lm.models.{remapping.get(kind, kind)}")


def translate_config(row: Row, config: dict[str, Any]) -> list[str]:
    """Put the config into the words of the row's module, in place; name what was changed."""
    changed = []
    if config.get("model_type") in row.model_types:
        changed.append("model_type")
        config["model_type"] = row.module.rpartition(".")[2]
    for fix in row.translations:
        text = config.get("text_config")
        if fix.apply(config, text if isinstance(text, dict) else config):
            changed.append(fix.id)
    return changed
