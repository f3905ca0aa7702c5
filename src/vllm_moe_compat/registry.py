"""Which mlx-lm modules the package serves, and what each of them expects.

``TRANSFORMS_BY_MODULE`` is explicit: a module that is not in it is never
touched. A row says in the field's words where the module's experts live, what
they are called and what it ignores. Dense rows get FP8 only; MoE rows get FP8
plus stacking. What upstream gets right by itself has no field here.
"""

from __future__ import annotations

from vllm_moe_compat.layout import Extras
from vllm_moe_compat.plan.row import Arithmetic, Moe, Row, Workaround

BLOCK_FP8 = Workaround(
    id="block-fp8",
    why="mlx-lm loads E4M3 bytes as uint8 and does not know `weight_scale_inv`",
    upstream="https://github.com/ml-explore/mlx-lm/pull/1224 (closed unmerged)",
    remove_when="the module's own sanitize multiplies block scales back",
    form="block FP8",
)
STACK_EXPERTS = Workaround(
    id="stack-experts",
    why="mlx-lm wants one tensor per projection; checkpoints have one per expert",
    upstream="https://github.com/ml-explore/mlx-lm/pull/1224 (closed unmerged)",
    remove_when="the module's own sanitize stacks per-expert tensors",
    form="per-expert",
)
NESTED_VISION = Workaround(
    id="nested-vision",
    why="mlx-lm drops `model.visual.*` but not the same tower under `model.language_model`",
    upstream="mlx_lm/models/qwen3_5.py, Model.sanitize",
    remove_when="the module's own sanitize drops `model.language_model.visual.*`",
    form="vision tower nested in the language model",
)

NORM_SHIFT = Workaround(
    id="norm-shift",
    why="mlx-lm adds 1 to norm weights in the checkpoint's dtype, which rounds them to bfloat16 "
    "even where float32 serves",
    upstream="mlx_lm/models/qwen3_5.py, TextModel.sanitize",
    remove_when="the module's own sanitize shifts norms in float32",
    form="bfloat16 norms, served in float32",
)

QWEN_MOE = Moe(
    source="mlp.experts",
    target="mlp.switch_mlp",
    projections=tuple((name, name) for name in ("gate_proj", "up_proj", "down_proj")),
)
QWEN3_5_EXTRAS = Extras(prefixes=("vision_tower", "model.visual"), parts=("mtp.",))
QWEN3_5_NORMS = Arithmetic(
    suffixes=(
        ".input_layernorm.weight",
        ".post_attention_layernorm.weight",
        "model.norm.weight",
        ".q_norm.weight",
        ".k_norm.weight",
    ),
    marker="conv1d.weight",
)
QWEN3_5_DROPS = Extras(prefixes=("model.language_model.visual.", "language_model.visual."))

_ROWS = (
    Row(
        "mlx_lm.models.qwen3_5",
        workarounds=(BLOCK_FP8, NESTED_VISION, NORM_SHIFT),
        extras=QWEN3_5_EXTRAS,
        drops=QWEN3_5_DROPS,
        arithmetic=QWEN3_5_NORMS,
    ),
    Row(
        "mlx_lm.models.qwen3_5_moe",
        workarounds=(BLOCK_FP8, STACK_EXPERTS, NESTED_VISION, NORM_SHIFT),
        moe=QWEN_MOE,
        extras=QWEN3_5_EXTRAS,
        drops=QWEN3_5_DROPS,
        arithmetic=QWEN3_5_NORMS,
    ),
)

TRANSFORMS_BY_MODULE: dict[str, Row] = {row.module: row for row in _ROWS}


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
