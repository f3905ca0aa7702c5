"""Rows of dense families: FP8, config.json and names only."""

from __future__ import annotations

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.families import settings, settings_by_family, workarounds
from vllm_moe_compat.families.fixes import layer_types, windows
from vllm_moe_compat.families.row import Cache, Row
from vllm_moe_compat.families.row_builders import LIFTED, ROPE_ONLY, make_row

DENSE_ROWS: tuple[Row, ...] = (
    *(
        make_row(m, workarounds.FP8, translations=ROPE_ONLY)
        for m in ("olmo2", "seed_oss", "nemotron", "granite", "glm4", "stablelm", "ernie4_5")
    ),
    make_row(
        "llama",
        workarounds.FP8,
        translations=(settings.ROPE, settings.UNIFORM_KINDS),
        fixes=(windows.MISTRAL,),
    ),
    make_row("qwen2", workarounds.FP8, translations=ROPE_ONLY, fixes=(windows.LAYER_TYPES,)),
    make_row("phi3", workarounds.FP8, translations=ROPE_ONLY, fixes=(windows.EVERY_LAYER,)),
    make_row(
        "smollm3",
        workarounds.FP8,
        translations=(settings.ROPE, settings.UNIFORM_KINDS),
        fixes=(windows.LAYER_TYPES,),
    ),
    make_row("starcoder2", workarounds.FP8, translations=ROPE_ONLY, fixes=(windows.EVERY_LAYER,)),
    make_row("gemma2", workarounds.FP8, translations=ROPE_ONLY, fixes=(windows.GEMMA_2,)),
    make_row("qwen3", workarounds.FP8, fixes=(windows.LAYER_TYPES,)),
    make_row("youtu_llm", workarounds.FP8),
    make_row(
        "qwen3_vl",
        workarounds.FP8,
        dropped_upstream=Extras(prefixes=("visual", "model.visual", "vision_tower")),
    ),
    make_row(
        "olmo3",
        workarounds.FP8,
        translations=(settings_by_family.OLMO3_ROPE, settings.UNIFORM_KINDS),
        fixes=(windows.MIXED,),
    ),
    make_row(
        "minicpm3",
        workarounds.FP8,
        translations=(settings.ROPE, settings_by_family.MINICPM_ROPE),
        cache=Cache(expands_latent=True),
    ),
    make_row(
        "muse_glimmer",
        workarounds.FP8,
        dropped_here=Extras(
            prefixes=("model.vision_tower.", "model.vision_adapter.", "model.vision_projection.")
        ),
    ),
    make_row(
        "ministral3",
        workarounds.MINISTRAL_FP8,
        translations=(settings.UNIFORM_KINDS,),
        misreads=("fp8 tensor",),
        fixes=(windows.MISTRAL,),
    ),
    make_row(
        "exaone4",
        workarounds.FP8,
        translations=(settings.ROPE, settings.HEAD_DIM, settings_by_family.EXAONE4_PATTERN),
        fixes=(windows.MIXED,),
    ),
    make_row(
        "cohere2",
        workarounds.FP8,
        translations=(settings.ROPE, settings.WINDOW_PATTERN),
        fixes=layer_types.WINDOWED,
    ),
    make_row(
        "hunyuan_v1_dense",
        workarounds.FP8,
        translations=(settings.ROPE, settings_by_family.HUNYUAN_ROPE),
    ),
    make_row(
        "lfm2",
        workarounds.FP8,
        translations=(settings.BLOCK_DIM,),
        fixes=(layer_types.needs("full_attention", "conv"),),
        cache=Cache(states_skip_padding=True),
    ),
    make_row("falcon_h1", workarounds.FP8, translations=(settings.ROPE, settings.HEAD_DIM)),
    make_row("apertus", workarounds.FP8, translations=(settings.ROPE, settings.APERTUS)),
    make_row(
        "gemma3_text",
        workarounds.FP8,
        translations=(settings_by_family.GEMMA3_ROPE, settings.WINDOW_PATTERN),
        fixes=layer_types.WINDOWED,
    ),
    make_row(
        "gemma3",
        workarounds.FP8,
        dropped_upstream=Extras(prefixes=("vision_tower", "multi_modal_projector")),
        dropped_here=Extras(prefixes=("model.vision_tower", "model.multi_modal_projector")),
        renames=LIFTED,
        translations=(settings_by_family.GEMMA3_ROPE, settings.WINDOW_PATTERN, settings.VOCAB_SIZE),
        fixes=layer_types.WINDOWED,
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
