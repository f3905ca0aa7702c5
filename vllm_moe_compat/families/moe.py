"""Rows of MoE families, from Qwen to Step 3.5; DeepSeek's relatives are in ``deepseek``."""

from __future__ import annotations

from typing import Any

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.families import sanitize_wrappers, settings, settings_by_family, workarounds
from vllm_moe_compat.families.fixes import layer_types, routers
from vllm_moe_compat.families.fixes.clip_qkv import CLIP_QKV
from vllm_moe_compat.families.fixes.fix import ForwardFix
from vllm_moe_compat.families.installed import older
from vllm_moe_compat.families.row import (
    COMBINED,
    GLU,
    HEAD_IF_STORED,
    NEVER_TIED,
    OWN_HEAD,
    PER_EXPERT,
    TRANSPOSED,
    W123,
    Cache,
    Moe,
    NormShift,
    Row,
)
from vllm_moe_compat.families.row_builders import (
    ANY_ROOT,
    EXTRA_LAYERS,
    LIFTED,
    NESTED,
    NESTED_ALONE,
    NESTED_ROOTS,
    PLAIN,
    STANDARD,
    block_fp8_row,
    delta_norms,
    make_row,
    moe_row,
)

COMBINED_ONLY = Moe(stacks=(COMBINED,))
"""Releases with ``mlp.experts.gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``."""
BLOCK_SPARSE = Moe(
    sources=("block_sparse_moe.experts", "mlp.experts"),
    target="block_sparse_moe.switch_mlp",
    spelling=W123,
)
"""Releases like Mixtral's: ``block_sparse_moe.experts.{e}.w1``, ``w3``, ``w2``. transformers 5
saves the block as ``mlp``."""
GRANITE = Moe(
    sources=("block_sparse_moe", "block_sparse_moe.experts"),
    target="block_sparse_moe.switch_mlp",
    stacks=(COMBINED,),
    spelling=("input_linear", "output_linear"),
)
"""Releases with combined ``block_sparse_moe.input_linear`` and ``output_linear``."""
GEMMA_4 = Moe(sources=("experts", "moe", ""), target="experts.switch_glu", stacks=(COMBINED,))
TEXT_ALONE = (
    r"^model\.(?!language_model\.|vision_tower\.|multi_modal_projector\.)",
    "language_model.model.",
)
"""The names of a text model that was saved by itself, for a module with a vision tower."""
SWITCH_MLP = (r"\.(?:(?:experts|moe|mlp)\.)?switch_mlp\.", ".experts.switch_glu.")
"""Experts stacked under the name that most other modules have."""

QWEN_VISION = Extras(prefixes=("vision_tower", "model.visual"), parts=("mtp.",))
NESTED_VISION = Extras(prefixes=("model.language_model.visual.", "language_model.visual."))
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
LLAMA_VISION = Extras(parts=("vision_model", "multi_modal_projector"))
QWEN_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)
BLOCK_NAMES = ((r"\.mlp\.", ".block_sparse_moe."),)


def both_kinds(module: str) -> tuple[ForwardFix, ...]:
    """Return the refusal of layers of one kind, which an older module looks up in vain."""
    needs = layer_types.needs("full_attention", "linear_attention")
    return older(module, "if self.fa_idx is not None", needs.why, needs)


def per_expert(module: str, **fields: Any) -> Moe:
    """Return experts one by one, which an older module stacks only if layer 0 has some."""
    why = "experts are stacked only if layer 0 has some"
    plan_stacks = older(module, "moe_layers", why, True)
    return Moe(stacks=() if plan_stacks else (PER_EXPERT,), **fields)


PADDED_STATES = Cache(states_skip_padding=True)

MOE_ROWS: tuple[Row, ...] = (
    # The dense model. Norms are stored minus 1; some releases nest the vision tower in the
    # language model.
    make_row(
        "qwen3_5",
        workarounds.FP8,
        workarounds.NESTED_VISION,
        workarounds.NORM_SHIFT,
        workarounds.NORM_MARK,
        dropped_upstream=QWEN_VISION,
        dropped_here=NESTED_VISION,
        norm_shift=NormShift(QWEN_NORMS, "conv1d"),
        model_types=("qwen3_5_text",),
        translations=(settings.ATTENTION_INTERVAL,),
        cache=PADDED_STATES,
        roots=ANY_ROOT,
        fixes=(*both_kinds("qwen3_5"), *delta_norms("qwen3_5")),
    ),
    # The same with combined experts.
    make_row(
        "qwen3_5_moe",
        workarounds.FP8,
        workarounds.STACK_EXPERTS,
        workarounds.NESTED_VISION,
        workarounds.NORM_SHIFT,
        workarounds.NORM_MARK,
        moe=COMBINED_ONLY,
        dropped_upstream=QWEN_VISION,
        dropped_here=NESTED_VISION,
        norm_shift=NormShift(QWEN_NORMS, "conv1d"),
        model_types=("qwen3_5_moe_text",),
        translations=(settings.ATTENTION_INTERVAL,),
        cache=PADDED_STATES,
        roots=ANY_ROOT,
        fixes=(*both_kinds("qwen3_5"), *delta_norms("qwen3_5")),
    ),
    # Per-expert. Norms are stored minus 1, and sanitize skips them if experts are stacked.
    moe_row(
        "qwen3_next",
        per_expert("qwen3_next"),
        workarounds.NORM_SHIFT,
        workarounds.EARLY_RETURN,
        dropped_upstream=Extras(parts=("mtp.",)),
        norm_shift=NormShift(QWEN_NORMS, "per-expert"),
        translations=(settings.ATTENTION_INTERVAL,),
        cache=PADDED_STATES,
        fixes=(*both_kinds("qwen3_next"), *delta_norms("qwen3_next")),
    ),
    moe_row("qwen2_moe", translations=(settings.ALL_SPARSE,), head=OWN_HEAD),
    moe_row("qwen3_moe", per_expert("qwen3_moe"), workarounds.CONFIG),
    # Combined experts [E, H, 2I], transposed.
    moe_row(
        "qwen3_vl_moe",
        Moe(stacks=(TRANSPOSED,), transposed=True),
        workarounds.TIED_HEAD,
        dropped_upstream=Extras(prefixes=("visual", "model.visual", "vision_tower")),
        renames=older("qwen3_vl_moe", NESTED, NESTED_ALONE, *LIFTED),
        defaults=(("norm_topk_prob", True),),
        sanitize_wrapper=sanitize_wrappers.tied_head,
        roots=NESTED_ROOTS,
    ),
    moe_row("olmoe", STANDARD, workarounds.CONFIG, fixes=(CLIP_QKV,)),
    moe_row("mixtral", BLOCK_SPARSE, workarounds.CONFIG, renames=BLOCK_NAMES),
    moe_row(
        "phimoe",
        BLOCK_SPARSE,
        workarounds.CONFIG,
        renames=(*BLOCK_NAMES, (r"\.router\.weight$", ".gate.weight")),
        translations=older(
            "phimoe",
            "rope_scaling is None",
            "factors of LongRoPE are required",
            settings_by_family.PHIMOE_ROPE,
        ),
        fixes=older("phimoe", "sparsemixer", routers.SPARSE_MIXER.why, routers.SPARSE_MIXER),
        head=OWN_HEAD,
    ),
    # Released as MXFP4 blocks, which the module keeps. transformers saves combined bfloat16
    # experts [E, H, 2I] in which gate and up alternate.
    make_row(
        "gpt_oss",
        workarounds.FP8,
        workarounds.GPT_OSS_BF16,
        workarounds.CONFIG,
        moe=Moe(target="mlp.experts", stacks=(), transposed=True, interleaved=True),
        keeps=("mxfp4 blocks",),
        head=OWN_HEAD,
    ),
    # Combined experts [E, H, 2I] under feed_forward, with a vision model beside.
    moe_row(
        "llama4",
        Moe(
            sources=("feed_forward.experts",),
            target="feed_forward.experts",
            stacks=(TRANSPOSED,),
            transposed=True,
        ),
        workarounds.CONFIG,
        dropped_upstream=LLAMA_VISION,
        text_types=("llama4_text",),
        aliases=((r"^(model|lm_head)\.", r"language_model.\1."),),
        roots=("language_model.model.",),
        head=OWN_HEAD,
    ),
    moe_row(
        "gemma4",
        GEMMA_4,
        dropped_upstream=GEMMA_VISION,
        translations=(settings_by_family.GEMMA4_HEADS,),
        aliases=(SWITCH_MLP, (r"^lm_head\.", "language_model.lm_head.")),
        roots=NESTED_ROOTS,
    ),
    moe_row(
        "gemma4_text",
        GEMMA_4,
        model_types=("gemma4_unified_text",),
        translations=(settings_by_family.GEMMA4_HEADS,),
        aliases=(SWITCH_MLP,),
    ),
    moe_row(
        "granitemoe",
        GRANITE,
        workarounds.CONFIG,
        renames=((r"(block_sparse_moe\.router)\.weight$", r"\1.layer.weight"),),
    ),
    moe_row(
        "granitemoehybrid",
        GRANITE,
        renames=((r"(block_sparse_moe\.router)\.weight$", r"\1.layer.weight"),),
        translations=(settings_by_family.GRANITE_LAYERS, settings_by_family.GRANITE_NOPE),
    ),
    moe_row(
        "jamba",
        Moe(sources=("feed_forward.experts",), target="feed_forward.switch_mlp"),
        workarounds.JAMBA_ROUTER,
        translations=(settings_by_family.JAMBA_OFFSET,),
        sanitize_wrapper=sanitize_wrappers.jamba_router,
    ),
    moe_row(
        "lfm2_moe",
        Moe(
            sources=("feed_forward.experts",),
            target="feed_forward.switch_mlp",
            spelling=(*W123, *GLU),
        ),
        workarounds.OWN_HEAD,
        cache=PADDED_STATES,
        fixes=older(
            "lfm2_moe",
            "routed_scaling_factor",
            routers.SIGMOID_ROUTER.why,
            routers.SIGMOID_ROUTER,
        ),
        head=HEAD_IF_STORED,
        sanitize_wrapper=sanitize_wrappers.own_head,
    ),
    # Per-expert without a gate: up_proj and down_proj under mixer.experts.
    moe_row(
        "nemotron_h",
        Moe(
            sources=("mixer.experts",),
            target="mixer.switch_mlp",
            projections=(("up", "fc1"), ("down", "fc2")),
        ),
        dropped_upstream=Extras(prefixes=("mtp.",)),
        renames=((r"^model\.", "backbone."),),
        aliases=((r"^(backbone|model)\.embedding\.", r"\1.embeddings."),),
        translations=older(
            "nemotron_h",
            "linear_attention",
            "layers_block_type and num_hidden_layers are required, in older words",
            settings_by_family.NEMOTRON_KINDS,
            settings_by_family.NEMOTRON_LAYERS,
        ),
        roots=("backbone.", "model."),
        head=NEVER_TIED,
        embedding="embeddings",
    ),
    # Per-expert, with a correction bias of the router that sanitize deletes.
    moe_row(
        "ernie4_5_moe",
        STANDARD,
        workarounds.ERNIE_BIAS,
        workarounds.CONFIG,
        dropped_upstream=Extras(
            parts=("mtp_block.", "mtp_linear_proj.", "mtp_hidden_norm.", "mtp_emb_norm.")
        ),
        renames=((r"\.gate\.moe_statics\.", ".moe_statics."),),
        sanitize_wrapper=sanitize_wrappers.ernie_bias,
    ),
    block_fp8_row(
        "minimax",
        BLOCK_SPARSE,
        renames=BLOCK_NAMES,
        translations=(settings.ROTARY_DIM,),
        defaults=(("shared_intermediate_size", 0),),
    ),
    moe_row(
        "minimax_m3_vl",
        BLOCK_SPARSE,
        text_types=("minimax_m3_vl_text",),
        aliases=(TEXT_ALONE,),
        keeps=("fp8 mx",),
        dropped_upstream=Extras(
            prefixes=("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
        ),
        dropped_here=Extras(
            prefixes=("model.vision_tower.", "model.multi_modal_projector."), parts=("mtp.",)
        ),
        renames=(
            *LIFTED,
            (r"\.mlp\.gate\.e_score_correction_bias$", ".block_sparse_moe.e_score_correction_bias"),
            (r"\.mlp\.(gate|shared_experts)\.", r".block_sparse_moe.\1."),
            (r"\.indexer\.([qk])_", r".index_\1_"),
        ),
        translations=(settings.ALL_ROTARY_DIM,),
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
        roots=NESTED_ROOTS,
    ),
    moe_row("afmoe", PLAIN, workarounds.CONFIG),
    moe_row("Klear", per_expert("Klear", target=PLAIN.target), head=OWN_HEAD),
    moe_row(
        "exaone_moe",
        dropped_upstream=Extras(prefixes=("mtp.",)),
        translations=(settings.IS_MOE_LAYER,),
    ),
    moe_row(
        "hunyuan",
        STANDARD,
        workarounds.HUNYUAN_ROUTER,
        workarounds.OWN_HEAD,
        model_types=("hunyuan_v1_moe",),
        translations=(settings_by_family.HUNYUAN_MOE, settings_by_family.HUNYUAN_ROPE),
        sanitize_wrapper=sanitize_wrappers.hunyuan_weights,
        head=HEAD_IF_STORED,
    ),
    moe_row(
        "laguna",
        renames=((r"\.shared_experts\.", ".shared_expert."),),
        roots=("model.", "language_model.model."),
    ),
    moe_row("mellum", STANDARD, workarounds.CONFIG),
    moe_row(
        "muse_spark",
        Moe(target="mlp.experts", stacks=(COMBINED,)),
        keeps=("nvfp4",),
        roots=(),
    ),
    # Per-expert without a gate: moe.mlp.{e}.fc1 and fc2.
    moe_row(
        "phixtral",
        Moe(
            sources=("moe.mlp",),
            target="moe.switch_mlp",
            spelling=("fc1", "fc2"),
            projections=(("up", "fc1"), ("down", "fc2")),
        ),
        roots=("transformer.",),
        head=OWN_HEAD,
    ),
    # Stacked gate_proj, up_proj and down_proj under moe; transformers saves mlp.experts.
    # Norms are stored minus 1.
    moe_row(
        "step3p5",
        Moe(sources=("moe", "moe.experts", "mlp.experts"), stacks=()),
        workarounds.NORM_SHIFT,
        dropped_upstream=EXTRA_LAYERS | Extras(parts=(".mtp",)),
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
        translations=(settings_by_family.STEP3,),
        roots=("model.", "model.language_model."),
        head=OWN_HEAD,
    ),
)
