"""Cut a model for one rank: by its class's own ``shard``, or by the shapes of its layers.

mlx-lm's classes with a ``shard()`` are cut by it. It checks few sizes: ``n_kv_heads //= N`` of
two heads for four ranks gives none. So the heads of keys and values are repeated first where
they are fewer than the ranks, and every number that ``shard()`` divides has to divide.

The other classes are cut layer by layer, by the recipes of ``attention``, ``linear_attention``
and ``feed_forward``. A layer that has no recipe, such as Mamba, is whole on every rank: it
computes the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.ranks import attention, feed_forward, linear_attention
from vllm_moe_compat.ranks.group import Group
from vllm_moe_compat.ranks.layers import arrays, run


@dataclass(slots=True)
class Cutting:
    """What became of a model's layers.

    Attributes:
        by_class: whether the class's own ``shard`` cut them.
        cut: paths of the parts that are cut, if it did not.
        whole: path → kind of the parts of layers that are whole on every rank.
    """

    by_class: bool = False
    cut: list[str] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)


def shard(model: Any, group: Group) -> Cutting:
    """Cut a model's layers in place, lazily; its outputs stay those of the whole model.

    Args:
        model: an mlx-lm model, loaded or not.
        group: the ranks.

    Raises:
        UnsupportedServingError: the ranks cannot have equal parts, or nothing can be cut. The
            model may be half cut.
    """
    if group.size() == 1:
        return Cutting()
    for _, layer in _layers(model):
        for module in layer.modules():
            attention.repeat_key_heads(module, group)
    if hasattr(type(model), "shard"):
        _by_class(model, group)
        return Cutting(by_class=True)
    found = Cutting()
    for path, layer in _layers(model):
        _cut_parts(layer, path, group, found)
    if not found.cut:
        raise UnsupportedServingError(
            f"{type(model).__module__} cannot be divided over {group.size()} ranks, since none of "
            "its layers has the shape of attention, an MLP or experts that this package knows; "
            "use tensor_parallel_size 1."
        )
    return found


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    for number, layer in enumerate(model.layers):
        if isinstance(layer, nn.Module):
            yield f"layers.{number}", layer


def _cut_parts(module: Any, path: str, group: Group, found: Cutting) -> None:
    """Cut the parts of a module, outermost first."""
    for name, each in module.children().items():
        several = each if isinstance(each, list) else [each]
        for number, value in enumerate(several):
            here = f"{path}.{name}" + (f".{number}" if isinstance(each, list) else "")
            if isinstance(value, nn.Module) and any(a.ndim > 1 for a in arrays(value)):
                before = len(found.cut)
                _cut_part(value, here, group, found)
                if len(found.cut) == before:
                    found.whole[here] = type(value).__name__


def _cut_part(module: Any, path: str, group: Group, found: Cutting) -> None:
    for recipes in (attention, linear_attention, feed_forward):
        recipe = recipes.recipe_of(module)
        if recipe is not None:
            run(recipe, module, path, group)
            found.cut.append(path)
            return
    if feed_forward.experts_in(module):
        if feed_forward.cut_block(module, path, group):
            found.cut.append(path)
    elif not attention.attribute(module, attention.HEADS):
        inside = Cutting()
        _cut_parts(module, path, group, inside)
        found.cut += inside.cut
        if inside.cut:
            found.whole |= inside.whole


def _by_class(model: Any, group: Group) -> None:
    """Call the class's ``shard``; every number that it divides has to divide."""
    before = _numbers(model)
    try:
        model.shard(group)
    except (AssertionError, ValueError) as error:
        raise UnsupportedServingError(
            f"{type(model).__module__} cannot be divided over {group.size()} ranks: "
            f"{' '.join(str(error).split()).rstrip('.')}; use another tensor_parallel_size."
        ) from error
    after = _numbers(model)
    for place, value in before.items():
        now = after.get(place, value)
        if now != value and now * group.size() != value:
            path, name = place
            raise UnsupportedServingError(
                f"{name} of {path} is {value}, which {group.size()} ranks cannot divide equally; "
                "use a tensor_parallel_size that divides it."
            )


def _numbers(model: Any) -> dict[tuple[str, str], int]:
    """Return the whole numbers that the model's modules have as attributes."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
