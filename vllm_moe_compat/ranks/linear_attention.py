"""Recipes for gated delta attention and Kimi's: its heads are divided, and its states with them.

A layer has projections one by one, or fused for each head of keys (``in_proj_qkvz``), or fused
one after the other (``in_proj_qkv``, and the channels of ``conv1d``).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.ranks.layers import LINEAR, Recipe, is_small, outputs, part

OUT = ("o_proj", "out_proj")
BY_HEAD = (
    *("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "f_proj", "f_b_proj", "g_b_proj"),
    *("in_proj_qkvz", "in_proj_ba", "in_proj_z", "in_proj_a", "in_proj_b"),
)
IN_TURN = "in_proj_qkv"
WHOLE = {"f_a_proj", "g_a_proj"}
CONVOLUTIONS = tuple(
    f"{letter}{kind}" for letter in "qkv" for kind in ("_conv1d", "_conv1d.conv", "_conv.conv")
)
NUMBERS = (
    *("num_v_heads", "num_k_heads", "key_dim", "value_dim", "conv_dim"),
    *("num_heads", "projection_dim", "projection_size"),
)


def recipe_of(module: Any) -> Recipe | None:
    """Return how a layer is cut; None if its parts are not of a known kind."""
    out = next((name for name in OUT if isinstance(module.get(name), LINEAR)), "")
    if not out or not isinstance(module.get("A_log"), mx.array) or "dt_bias" not in module:
        return None
    found = Recipe(columns=[out], heads=["A_log", "dt_bias"])
    for name in BY_HEAD:
        if isinstance(module.get(name), LINEAR):
            found.rows[name] = (outputs(module[name]),)
    if hasattr(module, "key_dim"):
        in_turn = (module.key_dim, module.key_dim, module.value_dim)
        if IN_TURN in module:
            found.rows[IN_TURN] = in_turn
        if "conv1d" in module:
            found.convolutions["conv1d"] = in_turn
    for name in CONVOLUTIONS:
        convolution = part(module, name)
        if isinstance(convolution, nn.Conv1d):
            found.convolutions[name] = (convolution.weight.shape[0],)
    found.divided = [name for name in NUMBERS if hasattr(module, name)]
    return found if found.convolutions and _rest_is_whole(found, module) else None


def _rest_is_whole(found: Recipe, module: Any) -> bool:
    """Whether the other parts compute the same on every rank: norms of one head."""
    done = {name.partition(".")[0] for name in found.parts} | WHOLE
    for name, value in module.items():
        if name in done or (isinstance(value, nn.Module) and is_small(value)):
            continue
        weight = value.get("weight") if isinstance(value, nn.Module) else None
        if not isinstance(weight, mx.array) or weight.ndim != 1:
            return False
    return True
