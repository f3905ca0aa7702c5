"""Rows of dense families: FP8, config.json and names only."""

from __future__ import annotations

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.families import sanitize_wrappers, settings, settings_by_family, workarounds
from vllm_moe_compat.families.fixes import latent_norms
from vllm_moe_compat.families.fixes.multipliers import KEY_MULTIPLIER
from vllm_moe_compat.families.fixes.older_attention import ALL_LAYERS
from vllm_moe_compat.families.installed import older
from vllm_moe_compat.families.row import HEAD_IF_STORED, OWN_HEAD, Cache, Row
from vllm_moe_compat.families.row_builders import (
    ANY_ROOT,
    LIFTED,
    NESTED,
    NESTED_ALONE,
    NESTED_ROOTS,
    make_row,
)

FALCON_MULTIPLIED = (
    *("embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight", "o_proj.weight"),
    *("out_proj.weight", "gate_proj.weight", "down_proj.weight", "in_proj.weight"),
)
"""``sanitize`` multiplies these by the multipliers of config.json."""

DENSE_ROWS: tuple[Row, ...] = (
    *(
        make_row(m, workarounds.FP8, workarounds.CONFIG)
        for m in ("llama", "qwen2", "olmo2", "olmo3", "phi3", "seed_oss", "smollm3", "nemotron")
    ),
    *(
        make_row(m, workarounds.FP8, workarounds.CONFIG)
        for m in ("granite", "ernie4_5", "starcoder2")
    ),
    make_row(
        "falcon_h1",
        workarounds.FP8,
        workarounds.CONFIG,
        computed=FALCON_MULTIPLIED,
        fixes=(
            KEY_MULTIPLIER,
            *older("falcon_h1", "[(None, None)] *", ALL_LAYERS.why, ALL_LAYERS),
        ),
    ),
    *(
        make_row(m, workarounds.FP8, workarounds.CONFIG, head=OWN_HEAD)
        for m in ("glm4", "stablelm")
    ),
    make_row(
        "gemma2",
        workarounds.FP8,
        workarounds.CONFIG,
        workarounds.OWN_HEAD,
        head=HEAD_IF_STORED,
        sanitize_wrapper=sanitize_wrappers.own_head,
    ),
    make_row("qwen3", workarounds.FP8),
    make_row("youtu_llm", workarounds.FP8, fixes=latent_norms.OF_CONFIG),
    make_row(
        "qwen3_vl",
        workarounds.FP8,
        dropped_upstream=Extras(prefixes=("visual", "model.visual", "vision_tower")),
        dropped_here=Extras(
            prefixes=older(
                "qwen3_vl", NESTED, "the vision tower is not dropped", "visual", "model.visual"
            )
        ),
        renames=older("qwen3_vl", NESTED, NESTED_ALONE, *LIFTED),
        roots=ANY_ROOT,
    ),
    make_row(
        "minicpm3",
        workarounds.FP8,
        translations=(settings_by_family.MINICPM_ROPE,),
        fixes=latent_norms.OF_MLX,
        cache=Cache(expands_latent=True),
        head=OWN_HEAD,
    ),
    make_row(
        "muse_glimmer",
        workarounds.FP8,
        dropped_here=Extras(
            prefixes=("model.vision_tower.", "model.vision_adapter.", "model.vision_projection.")
        ),
        roots=ANY_ROOT,
    ),
    make_row("ministral3", workarounds.MINISTRAL_FP8, misreads=("fp8 tensor",)),
    make_row("exaone4", workarounds.FP8, translations=(settings_by_family.EXAONE4_PATTERN,)),
    make_row(
        "cohere2",
        workarounds.FP8,
        workarounds.OWN_HEAD,
        translations=(settings.WINDOW_PATTERN,),
        head=HEAD_IF_STORED,
        sanitize_wrapper=sanitize_wrappers.own_head,
    ),
    make_row("hunyuan_v1_dense", workarounds.FP8, translations=(settings_by_family.HUNYUAN_ROPE,)),
    make_row(
        "lfm2",
        workarounds.FP8,
        workarounds.OWN_HEAD,
        translations=(
            settings.BLOCK_DIM,
            *older(
                "lfm2",
                "intermediate_size: Optional",
                "block_ff_dim is required",
                settings.BLOCK_FF_DIM,
            ),
        ),
        cache=Cache(states_skip_padding=True),
        head=HEAD_IF_STORED,
        sanitize_wrapper=sanitize_wrappers.own_head,
    ),
    make_row(
        "apertus",
        workarounds.FP8,
        defaults=(("mlp_bias", False), ("post_norm", False), ("qk_norm", True)),
    ),
    make_row(
        "gemma3_text",
        workarounds.FP8,
        translations=(settings.WINDOW_PATTERN,),
        head=HEAD_IF_STORED,
    ),
    make_row("gemma3_text", workarounds.FP8, translations=(settings.WINDOW_PATTERN,)),
    make_row(
        "gemma3",
        workarounds.FP8,
        dropped_upstream=Extras(prefixes=("vision_tower", "multi_modal_projector")),
        dropped_here=Extras(prefixes=("model.vision_tower", "model.multi_modal_projector")),
        renames=LIFTED,
        translations=(settings.WINDOW_PATTERN,),
        roots=NESTED_ROOTS,
        head=HEAD_IF_STORED,
    ),
    make_row(
        "olmo_hybrid",
        workarounds.FP8,
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
