"""Rows of DeepSeek and of the MoE families that follow its block.

Their releases have experts one by one under ``mlp.experts``, mostly latent attention, and a
prediction head appended as further decoder layers.
"""

from __future__ import annotations

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.families import sanitize_wrappers, settings, settings_by_family, workarounds
from vllm_moe_compat.families.fixes import latent_norms
from vllm_moe_compat.families.fixes.older_attention import VALUE_SCALE, indexer_halves
from vllm_moe_compat.families.installed import older
from vllm_moe_compat.families.row import (
    COMBINED,
    NEVER_TIED,
    OWN_HEAD,
    PER_EXPERT,
    W123,
    Cache,
    Moe,
    Row,
)
from vllm_moe_compat.families.row_builders import (
    ANY_ROOT,
    EXTRA_LAYERS,
    LIFTED,
    NESTED_ALONE,
    NESTED_ROOTS,
    PLAIN,
    STANDARD,
    block_fp8_row,
    delta_norms,
    make_row,
    moe_row,
)

ABSORBED = (".kv_b_proj.weight",)
"""``sanitize`` splits ``kv_b_proj`` within a head, to absorb it into query and output."""
MISTRAL_4 = Moe(stacks=(PER_EXPERT, COMBINED))
"""Both layouts are stacked by ``sanitize``."""
MISTRAL_VISION = Extras(parts=("vision_tower", "multi_modal_projector"))
KIMI_VISION = Extras(
    prefixes=("vision_tower", "vision_model", "multi_modal_projector", "mm_projector")
)
MODEL_FIRST = '"model.language_model."'
INDEXER = ("indexer_rope_interleave", "the indexer turns pairs, whatever the config says")

DEEPSEEK_ROWS: tuple[Row, ...] = (
    moe_row(
        "deepseek",
        head=OWN_HEAD,
    ),
    moe_row(
        "deepseek_v2",
        translations=(settings.DEEPSEEK_V2_YARN,),
        cache=Cache(expands_latent=True),
        head=OWN_HEAD,
    ),
    # Released in FP8 with blocks of 128x128; the prediction head is layer 61.
    block_fp8_row(
        "deepseek_v3",
        STANDARD,
        workarounds.LAYER_61,
        workarounds.CONFIG,
        computed=ABSORBED,
        dropped_here=EXTRA_LAYERS,
        sanitize_wrapper=sanitize_wrappers.layer_61,
        head=OWN_HEAD,
    ),
    block_fp8_row(
        "deepseek_v32",
        computed=ABSORBED,
        dropped_upstream=EXTRA_LAYERS,
        translations=(settings.FIRST_DENSE,),
        first_fixes=older("deepseek_v32", *INDEXER, indexer_halves(pairs=False)),
        head=OWN_HEAD,
    ),
    block_fp8_row(
        "glm_moe_dsa",
        computed=ABSORBED,
        dropped_upstream=EXTRA_LAYERS,
        translations=(settings.FIRST_DENSE,),
        defaults=(("topk_method", "noaux_tc"), ("scoring_func", "sigmoid"), ("moe_layer_freq", 1)),
        first_fixes=older("deepseek_v32", *INDEXER, indexer_halves(pairs=True)),
        head=OWN_HEAD,
    ),
    make_row(
        "deepseek_v41",
        keeps=("fp8", "mxfp4"),
        roots=(),
    ),
    # DeepSeek-V3's language model under language_model, with a vision tower; released as int4.
    block_fp8_row(
        "kimi_k25",
        STANDARD,
        workarounds.LAYER_61,
        workarounds.CONFIG,
        computed=ABSORBED,
        dropped_upstream=KIMI_VISION,
        dropped_here=EXTRA_LAYERS | Extras(prefixes=("model.vision_tower", "model.mm_projector")),
        renames=(*LIFTED, (r"^language_model\.model\.blocks\.", "language_model.model.layers.")),
        sanitize_wrapper=sanitize_wrappers.layer_61,
        roots=NESTED_ROOTS,
        head=OWN_HEAD,
    ),
    # DeepSeek's layers with kv_b_proj whole, and a vision tower.
    moe_row(
        "kimi_vl",
        STANDARD,
        workarounds.LATENT,
        workarounds.CONFIG,
        dropped_upstream=Extras(parts=("vision_tower", "rotary_emb", "multi_modal_projector")),
        latent=True,
        roots=("language_model.model.",),
        head=OWN_HEAD,
    ),
    # Per-expert w1/w3/w2 under block_sparse_moe; transformers 5 joins the convolutions of q, k, v.
    moe_row(
        "kimi_linear",
        Moe(sources=("block_sparse_moe.experts", "mlp.experts"), spelling=W123),
        computed=ABSORBED,
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
        translations=(settings.FIRST_DENSE, settings_by_family.KIMI_LINEAR),
        fixes=(*latent_norms.OF_CONFIG, *delta_norms("kimi_linear")),
        defaults=(("rope_theta", 10000.0),),
        head=NEVER_TIED,
    ),
    moe_row(
        "kimi_k3",
        Moe(sources=("block_sparse_moe.experts",), spelling=W123),
        computed=ABSORBED,
        keeps=("compressed-tensors",),
        dropped_upstream=KIMI_VISION | EXTRA_LAYERS | Extras(prefixes=("model.mtp", "mtp")),
        roots=("language_model.model.", "model."),
    ),
    moe_row(
        "glm4_moe",
        STANDARD,
        workarounds.CONFIG,
        dropped_upstream=EXTRA_LAYERS,
        head=OWN_HEAD,
    ),
    moe_row(
        "solar_open",
        dropped_upstream=EXTRA_LAYERS,
        defaults=(("first_k_dense_replace", 0), ("partial_rotary_factor", 1.0)),
        head=OWN_HEAD,
    ),
    moe_row(
        "glm4_moe_lite",
        computed=ABSORBED,
        dropped_upstream=EXTRA_LAYERS,
        translations=(settings.FIRST_DENSE,),
        fixes=latent_norms.OF_CONFIG,
        head=OWN_HEAD,
    ),
    moe_row("dots1", PLAIN, workarounds.CONFIG),
    # Two attentions per layer; the checkpoint has weights for identity experts.
    *(
        moe_row(
            module,
            computed=ABSORBED,
            dropped_upstream=Extras(prefixes=("model.mtp",)),
            dropped_here=Extras(beyond_experts=True),
            defaults=(
                ("attention_method", "MLA"),
                ("zero_expert_type", "identity"),
                ("mla_scale_q_lora", True),
                ("mla_scale_kv_lora", True),
            ),
            cache=Cache(attentions=2),
            fixes=fixes,
            head=OWN_HEAD,
        )
        # transformers has no class of the second to compare with.
        for module, fixes in (
            ("longcat_flash", latent_norms.OF_MLX),
            ("longcat_flash_ngram", ()),
        )
    ),
    block_fp8_row(
        "mistral4", MISTRAL_4, digests=("fp8 block 128", "fp8 tensor"), computed=ABSORBED
    ),
    block_fp8_row(
        "mimo_v2_flash",
        dropped_here=Extras(prefixes=("model.mtp",)),
        renames=((r"\.self_attn\.sinks$", ".self_attn.attention_sink_bias"),),
        translations=(settings_by_family.MIMO,),
        fixes=older("mimo_v2_flash", "attention_value_scale", VALUE_SCALE.why, VALUE_SCALE),
        head=OWN_HEAD,
    ),
    moe_row(
        "bailing_hybrid",
        computed=ABSORBED,
        dropped_upstream=EXTRA_LAYERS,
        embedding="word_embeddings",
    ),
    moe_row(
        "bailing_moe",
        embedding="word_embeddings",
    ),
    moe_row(
        "bailing_moe_linear",
        embedding="word_embeddings",
    ),
    moe_row(
        "bailing_moe_v3",
        computed=ABSORBED,
        dropped_upstream=EXTRA_LAYERS | Extras(parts=("mtp.",)),
        embedding="word_embeddings",
    ),
    make_row(
        "mistral3",
        workarounds.MINISTRAL_FP8,
        workarounds.OTHER_LAYOUTS,
        moe=MISTRAL_4,
        computed=ABSORBED,
        dropped_upstream=MISTRAL_VISION,
        dropped_here=Extras(
            prefixes=older(
                "mistral3",
                MODEL_FIRST,
                "vision is not dropped under model",
                *(f"model.{part}" for part in MISTRAL_VISION.parts),
            )
        ),
        misreads=("fp8 tensor",),
        renames=older("mistral3", MODEL_FIRST, NESTED_ALONE, *LIFTED),
        translations=older(
            "mistral3", "mistral4", "mistral4 is not known", settings_by_family.NO_MISTRAL_4
        ),
        roots=ANY_ROOT,
    ),
)
