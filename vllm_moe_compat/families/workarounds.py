"""Gaps of mlx-lm, one ``Workaround`` each, shared by the rows that need it.

``proofs`` names checkpoint variants that fail in mlx-lm as long as the workaround is needed;
``vllm-moe-compat status`` and the tests marked ``compat`` try them.
"""

from __future__ import annotations

from vllm_moe_compat.checkpoint.config import layer_count
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.families.row import Symptom, Workaround


def _has(layout: Layout, ending: str) -> bool:
    return any(name.endswith(ending) for name in layout.tensors)


_PR = "https://github.com/ml-explore/mlx-lm/pull/1224 (closed unmerged)"

FP8 = Workaround(
    id="fp8",
    why="mlx-lm loads E4M3 bytes as uint8 and does not multiply them by their scales",
    upstream=_PR,
    remove_when="the module's own sanitize dequantises scales per block, channel and tensor",
    form="FP8",
    proofs=("block FP8 128", "block FP8", "per-channel FP8"),
)
FP8_FORMS = Workaround(
    id="fp8-forms",
    why="sanitize dequantises blocks of 128x128 only, in bfloat16, and drops or misreads "
    "weight_scale and E8M0 scales",
    upstream="mlx_lm/models/deepseek_v3.py, Model.sanitize",
    remove_when="the module's own sanitize reads every form of scale",
    form="FP8 other than blocks of 128x128",
    proofs=("block FP8", "per-channel FP8"),
)
MINISTRAL_FP8 = Workaround(
    id="ministral-fp8",
    why="sanitize multiplies the scale with the E4M3 bytes instead of their values: it loads, "
    "and generates garbage",
    upstream="mlx_lm/models/ministral3.py, Model.sanitize",
    remove_when="the module's own sanitize calls from_fp8",
    form="per-tensor FP8",
    proofs=("per-tensor FP8", "block FP8 128"),
)
STACK_EXPERTS = Workaround(
    id="stack-experts",
    why="mlx-lm expects one tensor per projection; checkpoints have one per expert",
    upstream=_PR,
    remove_when="the module's own sanitize stacks per-expert tensors",
    form="per-expert",
    proofs=("per-expert",),
)
OTHER_LAYOUTS = Workaround(
    id="other-layouts",
    why="sanitize stacks one layout of experts; re-saved and quantised checkpoints have others",
    upstream="mlx_lm/models/*.py, Model.sanitize",
    remove_when="the module's own sanitize stacks per-expert and combined experts",
    form="experts in another layout than the release's",
    proofs=("per-expert", "per-expert w1/w2/w3", "combined", "combined transposed"),
)
NESTED_VISION = Workaround(
    id="nested-vision",
    why="mlx-lm drops `model.visual.*` but not the same tower under `model.language_model`",
    upstream="mlx_lm/models/qwen3_5.py, Model.sanitize",
    remove_when="the module's own sanitize drops `model.language_model.visual.*`",
    form="vision tower nested in the language model",
    proofs=("nested vision tower",),
)
NORM_SHIFT = Workaround(
    id="norm-shift",
    why="mlx-lm adds 1 to norm weights in the checkpoint's dtype, which rounds them to bfloat16 "
    "even if the model is served in float32",
    upstream="mlx_lm/models/qwen3_5.py, TextModel.sanitize",
    remove_when="the module's own sanitize shifts norms in float32",
    form="bfloat16 norms, served in float32",
    proofs=("bfloat16 norms",),
)
NORM_MARK = Workaround(
    id="norm-mark",
    why="mlx-lm adds 1 to norm weights only if a layer has a convolution",
    upstream="mlx_lm/models/qwen3_5.py, TextModel.sanitize",
    remove_when="the shift no longer depends on conv1d",
    form="no linear attention",
    proofs=("release",),
    families=("qwen3_5 softmax",),
)
EARLY_RETURN = Workaround(
    id="early-return",
    why="sanitize shifts norms, transposes convolutions and drops the prediction head only if "
    "experts are per-expert",
    upstream="mlx_lm/models/qwen3_next.py, Model.sanitize",
    remove_when="the rest of sanitize no longer depends on the experts",
    form="combined or FP8 experts",
    proofs=("combined", "block FP8"),
)
LAYER_61 = Workaround(
    id="layer-61",
    why="sanitize drops layer 61, DeepSeek-V3's prediction head, whatever the model's depth",
    upstream="mlx_lm/models/deepseek_v3.py, Model.sanitize",
    remove_when="the module's own sanitize drops layers from num_hidden_layers on",
    form="another depth than 61 layers",
    proofs=("release",),
    families=("deepseek_v3 deep", "kimi_k25 deep"),
    symptom=Symptom(refuses=True, occurs=lambda layout, config: (layer_count(config) or 0) > 61),
)
ERNIE_BIAS = Workaround(
    id="ernie-bias",
    why="sanitize deletes e_score_correction_bias, which takes part in the choice of experts",
    upstream="mlx_lm/models/ernie4_5_moe.py, Model.sanitize and Ernie4_5_MoeMLP",
    remove_when="Ernie4_5_MoeMLP has the bias",
    form="every form",
    proofs=("release",),
    symptom=Symptom(
        refuses=False, occurs=lambda layout, config: _has(layout, "e_score_correction_bias")
    ),
)
JAMBA_ROUTER = Workaround(
    id="jamba-router",
    why="the router's softmax is taken over the chosen experts, not over all",
    upstream="mlx_lm/models/jamba.py, JambaSparseMoeBlock",
    remove_when="JambaSparseMoeBlock takes the softmax first",
    form="every form",
    proofs=("release",),
    symptom=Symptom(refuses=False, occurs=lambda layout, config: bool(layout.experts)),
)
HUNYUAN_ROUTER = Workaround(
    id="hunyuan-router",
    why="mlx-lm has no module for hunyuan_v1_moe; the module of the earlier model does not "
    "normalise the chosen experts' weights",
    upstream="mlx_lm/models/hunyuan.py, MoeBlock",
    remove_when="mlx-lm has a module for hunyuan_v1_moe",
    form="model_type hunyuan_v1_moe",
    proofs=("release",),
    symptom=Symptom(
        refuses=False,
        occurs=lambda layout, config: config.get("model_type") == "hunyuan_v1_moe",
    ),
)
TIED_HEAD = Workaround(
    id="tied-head",
    why="sanitize requires an output head, which a tied checkpoint does not have",
    upstream="mlx_lm/models/qwen3_vl_moe.py, Model.sanitize",
    remove_when="the module's own sanitize loads tied checkpoints",
    form="tied embeddings",
    proofs=("release",),
    families=("qwen3_vl_moe tied",),
    symptom=Symptom(refuses=True, occurs=lambda layout, config: not _has(layout, "lm_head.weight")),
)
OWN_HEAD = Workaround(
    id="own-head",
    why="the module takes the embeddings for the output head, and refuses a head beside them",
    upstream="mlx_lm/models/{gemma2,cohere2,lfm2,lfm2_moe,hunyuan}.py, Model.__call__",
    remove_when="the module has an lm_head where tie_word_embeddings is false",
    form="an output head that differs from the embeddings",
    proofs=("own output head",),
    symptom=Symptom(refuses=True, occurs=lambda layout, config: _has(layout, "lm_head.weight")),
)
LATENT = Workaround(
    id="latent-split",
    why="sanitize does not split kv_b_proj into the embed_q and unembed_out of the attention",
    upstream="mlx_lm/models/kimi_vl.py, Model.sanitize",
    remove_when="the module's own sanitize splits kv_b_proj",
    form="every published form",
    proofs=("release",),
)
GPT_OSS_BF16 = Workaround(
    id="gpt-oss-bf16",
    why="sanitize splits unquantised experts along the wrong axis and omits `.weight`",
    upstream="mlx_lm/models/gpt_oss.py, Model.sanitize",
    remove_when="the module's own sanitize loads what transformers saves",
    form="unquantised or FP8",
    proofs=("release",),
)
NAMES = Workaround(
    id="names",
    why="transformers 5 saves tensors under names of its own",
    upstream="https://github.com/huggingface/transformers (src/transformers/conversion_mapping.py)",
    remove_when="the module's own sanitize knows the names",
    form="saved with save_original_format=False",
    proofs=("in-library",),
)
CONFIG = Workaround(
    id="config",
    why="transformers 5 writes config.json with keys that the module's arguments do not have",
    upstream="https://github.com/huggingface/transformers (v5 configurations)",
    remove_when="the module's ModelArgs read them",
    form="config.json written by transformers 5",
    proofs=("saved config",),
)
