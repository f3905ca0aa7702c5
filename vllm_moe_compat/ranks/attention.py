"""Recipes for attention: which part of which layer a rank gets, by whole heads.

Two kinds are known by their parts: attention with projections of query, key and value, one by
one or fused, and latent attention, whose cache all ranks hold and whose heads they divide.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.ranks.group import Group
from vllm_moe_compat.ranks.layers import (
    LINEAR,
    PER_HEAD,
    Recipe,
    inputs,
    is_small,
    outputs,
)

HEADS = ("n_heads", "num_heads", "num_attention_heads")
KEY_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads")
RATIOS = ("repeats", "num_key_value_groups", "n_rep")
FUSED = ("qkv_proj", "query_key_value", "Wqkv")
OUT = ("o_proj", "out_proj", "dense")
GATES = ("gate_proj", "g_proj")
LATENT_WHOLE = {"q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"}


def attribute(module: Any, names: tuple[str, ...]) -> str:
    """Return which of the attributes a module has as a number above 0; empty for none."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return name
    return ""


def child(module: Any, names: tuple[str, ...]) -> str:
    """Return which of the names is a linear part of a module; empty for none."""
    return next((name for name in names if isinstance(module.get(name), LINEAR)), "")


def recipe_of(module: Any) -> Recipe | None:
    """Return how an attention layer is cut; None if its parts are not of a known kind."""
    heads, out = attribute(module, HEADS), child(module, OUT)
    if not heads or not out:
        return None
    found = _latent(module, heads) or _softmax(module, heads)
    if found is None or not _gates(found, module, heads):
        return None
    found.columns.append(out)
    found.divided.append(heads)
    count = getattr(module, heads)
    for name, value in module.items():
        if isinstance(value, mx.array) and value.shape == (count,):
            found.heads.append(name)
    _norms_of_groups(found, module, inputs(module[out]))
    width = next(iter(found.rows.values()))[0] // count
    if "k_proj" in found.rows:
        key_heads = attribute(module, KEY_HEADS) or heads
        width = min(width, found.rows["k_proj"][0] // getattr(module, key_heads))
    return found if _rest_is_whole(found, module, width) else None


def _norms_of_groups(found: Recipe, module: Any, width: int) -> None:
    """Add norms over groups of the heads' output, of which each rank has whole ones."""
    for name, value in module.items():
        if not isinstance(value, nn.Module) or not attribute(value, ("groups",)):
            continue
        if isinstance(value.get("weight"), mx.array) and value.weight.shape == (width,):
            found.groups.append(name)


def _softmax(module: Any, heads: str) -> Recipe | None:
    key_heads = attribute(module, KEY_HEADS)
    count = getattr(module, heads)
    key_count = getattr(module, key_heads) if key_heads else count
    if fused := child(module, FUSED):
        width, left = divmod(outputs(module[fused]), count + 2 * key_count)
        if left:
            return None
        rows: dict[str, tuple[int, ...]] = {
            fused: (count * width, key_count * width, key_count * width)
        }
    elif child(module, ("q_proj",)):
        rows = {n: (outputs(module[n]),) for n in ("q_proj", "k_proj", "v_proj") if n in module}
    else:
        return None
    found = Recipe(rows=rows, divided=[key_heads] if key_heads else [])
    if key_heads:
        found.ratios = {name: (heads, key_heads) for name in RATIOS if hasattr(module, name)}
    for name, wide in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
        norm = module.get(name)
        if wide in rows and type(norm) is nn.RMSNorm and norm.weight.size == rows[wide][0]:
            found.norms.append(name)
    return found


def _latent(module: Any, heads: str) -> Recipe | None:
    query = child(module, ("q_b_proj", "q_proj"))
    if not query or "kv_a_proj_with_mqa" not in module:
        return None
    found = Recipe(rows={query: (outputs(module[query]),)})
    if child(module, ("kv_b_proj",)):
        found.rows["kv_b_proj"] = (outputs(module["kv_b_proj"]),)
    elif all(isinstance(module.get(name), PER_HEAD) for name in ("embed_q", "unembed_out")):
        found.heads += ["embed_q", "unembed_out"]
    else:
        return None
    key_heads = attribute(module, KEY_HEADS)
    if key_heads and getattr(module, key_heads) == getattr(module, heads):
        found.divided.append(key_heads)
    return found


def _gates(found: Recipe, module: Any, heads: str) -> bool:
    """Add gates on the heads' output; return whether all are of a known shape."""
    for name in GATES:
        if name in module:
            if not isinstance(module[name], LINEAR):
                return False
            if outputs(module[name]) % getattr(module, heads):
                return False
            found.rows[name] = (outputs(module[name]),)
    return True


def _rest_is_whole(found: Recipe, module: Any, width: int) -> bool:
    """Whether the other parts compute the same on every rank: norms of one head, rotation.

    Args:
        found: the recipe.
        module: the layer.
        width: size of one head.
    """
    for name, value in module.items():
        if name in found.parts or name in LATENT_WHOLE:
            continue
        if isinstance(value, mx.array):
            return False
        if not isinstance(value, nn.Module) or is_small(value):
            continue
        weight = value.get("weight")
        if not isinstance(weight, mx.array) or weight.ndim != 1 or weight.size > width:
            return False
    return True


def repeat_key_heads(module: Any, group: Group) -> None:
    """Repeat the heads of keys and values where there are fewer of them than ranks.

    Each rank then has one head. Lazy; nothing changes if there are enough heads, or if the
    layer's projections are fused.
    """
    name = attribute(module, KEY_HEADS)
    parts = [p for p in ("k_proj", "v_proj") if isinstance(module.get(p), LINEAR)]
    if not name or not parts or "kv_a_proj_with_mqa" in module:
        return
    count = getattr(module, name)
    if count >= group.size() or group.size() % count:
        return
    norm = module.get("k_norm")
    if isinstance(norm, nn.Module) and norm.weight.size == outputs(module[parts[0]]):
        parts.append("k_norm")
    for name_of_part in parts:
        found = module[name_of_part]
        rows = found.weight.shape[0]
        for key, array in list(found.items()):
            if isinstance(array, mx.array) and array.ndim and array.shape[0] == rows:
                each = array.reshape(count, -1, *array.shape[1:])
                repeated = mx.repeat(each, group.size() // count, axis=0)
                found[key] = repeated.reshape(-1, *array.shape[1:])
    setattr(module, name, group.size())
    for ratio in RATIOS:
        if hasattr(module, ratio):
            setattr(module, ratio, getattr(module, attribute(module, HEADS)) // group.size())
