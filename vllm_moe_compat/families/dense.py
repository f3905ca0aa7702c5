"""Rows of dense families: FP8, config.json and names only."""

from __future__ import annotations

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.families import sanitize_wrappers, settings, settings_by_family, workarounds
from vllm_moe_compat.families.row import HEAD_IF_STORED, OWN_HEAD, Cache, Row
from vllm_moe_compat.families.row_builders import (
    ANY_ROOT,
    LIFTED,
    NESTED_ROOTS,
    ROPE_ONLY,
    make_row,
)

DENSE_ROWS: tuple[Row, ...] = (
    *(
        make_row(m, workarounds.FP8, translations=ROPE_ONLY)
        for m in ("llama", "qwen2", "olmo2", "phi3", "seed_oss")
    ),
    *(
        make_row(m, workarounds.FP8, translations=ROPE_ONLY)
        for m in ("smollm3", "nemotron", "granite", "ernie4_5", "starcoder2")
    ),
    *(
        make_row(m, workarounds.FP8, translations=ROPE_ONLY, head=OWN_HEAD)
        for m in ("glm4", "stablelm")
    ),
    make_row(
        "gemma2",
        workarounds.FP8,
        workarounds.OWN_HEAD,
        translations=ROPE_ONLY,
        cache=Cache(ignores_window=True),
        head=HEAD_IF_STORED,
        sanitize_wrapper=sanitize_wrappers.own_head,
    ),
    *(make_row(m, workarounds.FP8) for m in ("qwen3", "youtu_llm")),
    make_row(
        "qwen3_vl",
        workarounds.FP8,
        dropped_upstream=Extras(prefixes=("visual", "model.visual", "vision_tower")),
        roots=ANY_ROOT,
    ),
    make_row("olmo3", workarounds.FP8, translations=(settings_by_family.OLMO3_ROPE,)),
    make_row(
        "minicpm3",
        workarounds.FP8,
        translations=(settings.ROPE, settings_by_family.MINICPM_ROPE),
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
    make_row(
        "exaone4",
        workarounds.FP8,
        translations=(settings.ROPE, settings.HEAD_DIM, settings_by_family.EXAONE4_PATTERN),
    ),
    make_row(
        "cohere2",
        workarounds.FP8,
        workarounds.OWN_HEAD,
        translations=(settings.ROPE, settings.WINDOW_PATTERN),
        head=HEAD_IF_STORED,
        sanitize_wrapper=sanitize_wrappers.own_head,
    ),
    make_row(
        "hunyuan_v1_dense",
        workarounds.FP8,
        translations=(settings.ROPE, settings_by_family.HUNYUAN_ROPE),
    ),
    make_row(
        "lfm2",
        workarounds.FP8,
        workarounds.OWN_HEAD,
        translations=(settings.BLOCK_DIM,),
        cache=Cache(states_skip_padding=True),
        head=HEAD_IF_STORED,
        sanitize_wrapper=sanitize_wrappers.own_head,
    ),
    make_row("falcon_h1", workarounds.FP8, translations=(settings.ROPE, settings.HEAD_DIM)),
    make_row("apertus", workarounds.FP8, translations=(settings.ROPE, settings.APERTUS)),
    make_row(
        "gemma3_text",
        workarounds.FP8,
        translations=(settings_by_family.GEMMA3_ROPE, settings.WINDOW_PATTERN),
        head=HEAD_IF_STORED,
    ),
    make_row(
        "gemma3",
        workarounds.FP8,
        dropped_upstream=Extras(prefixes=("vision_tower", "multi_modal_projector")),
        dropped_here=Extras(prefixes=("model.vision_tower", "model.multi_modal_projector")),
        renames=LIFTED,
        translations=(settings_by_family.GEMMA3_ROPE, settings.WINDOW_PATTERN, settings.VOCAB_SIZE),
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
