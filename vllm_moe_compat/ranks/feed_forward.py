"""Recipes for MLPs and experts: the intermediate axis is divided, and the results are summed.

Every rank computes all experts, each on its part of the intermediate axis, so ranks are never
idle and no token travels. A block of experts adds routed and shared experts first, and is
summed once over the ranks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace

from vllm_moe_compat.ranks.group import Group
from vllm_moe_compat.ranks.layers import (
    LINEAR,
    SWITCH,
    Recipe,
    divide,
    ends,
    groups_of,
    inputs,
    is_small,
    outputs,
)

UP = ("gate_proj", "up_proj", "w1", "w3", "c_fc", "fc1")
UP_TWICE = ("gate_up_proj", "input_linear")
DOWN = ("down_proj", "w2", "c_proj", "fc2", "output_linear")


def recipe_of(module: Any) -> Recipe | None:
    """Return how an MLP, or experts, are cut; None if the parts are not of a known kind."""
    found, width = Recipe(), 0
    for name, value in module.items():
        if name in DOWN and isinstance(value, (*LINEAR, *SWITCH)):
            found.columns.append(name)
            width = inputs(value)
        elif name in UP + UP_TWICE and isinstance(value, (*LINEAR, *SWITCH)):
            rows = outputs(value)
            found.rows[name] = (rows,) if name in UP else (rows // 2,) * 2
        elif not isinstance(value, nn.Module) or not is_small(value):
            return None
    sums = {sum(pieces) // len(pieces) for pieces in found.rows.values()}
    return found if len(found.columns) == 1 and sums == {width} else None


def is_experts(module: Any) -> bool:
    """Whether a module consists of the projections of routed experts."""
    return any(isinstance(value, SWITCH) for value in module.values())


def experts_in(module: Any) -> list[str]:
    """Return the names of a block's routed experts."""
    return [n for n, v in module.items() if isinstance(v, nn.Module) and is_experts(v)]


def cut_block(module: Any, path: str, group: Group) -> bool:
    """Cut a block's routed and shared experts in place, and sum its output over the ranks.

    Args:
        module: a module with routed experts as a direct part.
        path: its path, for messages.
        group: the ranks.

    Returns:
        Whether it was cut; otherwise it is whole, since its parts are not of a known kind.

    Raises:
        UnsupportedServingError: the ranks cannot have equal parts.
    """
    recipes: dict[str, Recipe] = {}
    for name, value in module.items():
        if isinstance(value, nn.Module) and not is_small(value):
            recipe = recipe_of(value)
            if recipe is not None:
                recipes[name] = recipe
            elif is_experts(value) or any(isinstance(m, SWITCH) for m in value.modules()):
                return False
    for name, recipe in recipes.items():
        _cut_inplace(module[name], recipe, f"{path}.{name}", group)
    if hasattr(module, "sharding_group"):
        module.sharding_group = group
    else:
        sum_output(module, group)
    return True


def _cut_inplace(module: Any, recipe: Recipe, path: str, group: Group) -> None:
    """Cut an MLP without summing; the bias of its output is divided instead."""
    (down,) = recipe.columns
    linear = module[down]
    divide(inputs(linear), group, f"the input of {path}.{down}", groups_of(linear))
    for name, pieces in recipe.rows.items():
        keep_global_scale(module[name], "all-to-sharded", ends(pieces), group)
    keep_global_scale(linear, "sharded-to-all", 1, group)
    if "bias" in linear:
        linear.bias = linear.bias / group.size()


def keep_global_scale(linear: Any, sharding: str, segments: Any, group: Group) -> None:
    """Cut a linear layer in place, except the factor that all of its values share."""
    factor = linear.pop("global_scale", None)
    shard_inplace(linear, sharding, segments=segments, group=group)
    if factor is not None:
        linear.global_scale = factor


def sum_output(module: Any, group: Group) -> None:
    """Make a module return the sum of all ranks' outputs."""
    kind: Any = type(module)
    module.__class__ = _summed(kind)
    module.sharding_group = group


@cache
def _summed(kind: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        partial = kind.__call__(self, *args, **kwargs)
        return mx.distributed.all_sum(partial, group=self.sharding_group)

    members = {"__call__": call, "__module__": kind.__module__}
    return type(f"Summed{kind.__name__}", (kind,), members)
