"""Build registry rows; values that several families share."""

from __future__ import annotations

from typing import Any

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.families import workarounds
from vllm_moe_compat.families.activation_by_module import activation_fixes
from vllm_moe_compat.families.fixes.delta_norms import DELTA_NORMS
from vllm_moe_compat.families.fixes.fix import ForwardFix
from vllm_moe_compat.families.fixes.rotary import DYNAMIC_LIMIT
from vllm_moe_compat.families.installed import older
from vllm_moe_compat.families.layers_by_module import FIXES, TRANSLATIONS
from vllm_moe_compat.families.rotary_by_module import rotary_fixes
from vllm_moe_compat.families.row import Moe, Row, Workaround

STANDARD = Moe()
"""Experts one by one under ``mlp.experts``, stacked by ``sanitize`` under ``mlp.switch_mlp``."""
PLAIN = Moe(target="mlp.experts")
"""The module keeps stacked experts under the name that releases have."""
EXTRA_LAYERS = Extras(beyond_layers=True)
"""The release appends its prediction head as further decoder layers."""
NESTED_ROOTS = ("model.language_model.", "language_model.model.")
"""Beginnings of the language model's names beside a vision tower: released, and in mlx-lm."""
ANY_ROOT = (*NESTED_ROOTS, "model.")
"""The same where the module loads the language model alone too."""
LIFTED = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
)
"""transformers 5 saves the language model under ``model.language_model``, mlx-lm's
multimodal modules expect it under ``language_model.model``."""

NESTED = '.get("language_model")'
"""Text of a module that finds the language model under ``model.language_model``."""
NESTED_ALONE = "the language model is found under language_model.model alone"


def delta_norms(module: str) -> tuple[ForwardFix, ...]:
    """Return the fix of the norms in the gated delta layers of an older module."""
    return older(module, "normalize_qk", DELTA_NORMS.why, DELTA_NORMS)


def make_row(module: str, *needed: Workaround, **fields: Any) -> Row:
    """Return the row of ``mlx_lm.models.{module}``.

    The workarounds for config keys and tensor names are added where the row has such fields, the
    module's windows, kinds of layers, rotary embeddings and activations from their tables.
    ``first_fixes`` come before those of the tables.
    """
    turning = rotary_fixes(module)
    # Layers are made anew before their embeddings and activations are put in.
    common = (*FIXES.get(module, ()), *turning, *activation_fixes(module))
    fields["fixes"] = (*fields.pop("first_fixes", ()), *common, *fields.get("fixes", ()))
    if turning:
        fields["limits"] = (DYNAMIC_LIMIT, *fields.get("limits", ()))
    fields["translations"] = (*fields.get("translations", ()), *TRANSLATIONS.get(module, ()))
    changes = fields["translations"] or fields.get("defaults")
    if changes and workarounds.CONFIG not in needed:
        needed += (workarounds.CONFIG,)
    if fields.get("renames") or fields.get("splits"):
        needed += (workarounds.NAMES,)
    return Row(f"mlx_lm.models.{module}", workarounds=needed, **fields)


def moe_row(module: str, moe: Moe = STANDARD, *needed: Workaround, **fields: Any) -> Row:
    """Return the row of a module whose ``sanitize`` stacks the release's unquantised experts."""
    needed = (workarounds.FP8, workarounds.OTHER_LAYOUTS, *needed)
    return make_row(module, *needed, moe=moe, **fields)


def block_fp8_row(module: str, moe: Moe = STANDARD, *needed: Workaround, **fields: Any) -> Row:
    """Return the row of a module whose ``sanitize`` dequantises FP8 in blocks of 128x128."""
    fields.setdefault("digests", ("fp8 block 128",))
    needed = (workarounds.FP8_FORMS, workarounds.OTHER_LAYOUTS, *needed)
    return make_row(module, *needed, moe=moe, **fields)
