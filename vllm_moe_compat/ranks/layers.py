"""Cutting one layer of a model by a recipe: which of its parts lose rows, columns or heads.

A recipe is made completely before anything is cut, so a layer that is not of a known shape
stays whole. The values are cut lazily.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.ranks.group import Group

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
PER_HEAD = (MultiLinear, QuantizedMultiLinear)


@dataclass(slots=True)
class Recipe:
    """How the parts of one layer are cut.

    Attributes:
        rows: linear part → sizes of the pieces that its output consists of; each is cut.
        columns: linear parts whose input is cut; their output is summed.
        heads: parts and arrays that are cut along their first axis.
        convolutions: part → sizes of the pieces of its channels.
        norms: norms over all heads.
        groups: norms over groups of heads.
        divided: attributes with a number of heads or a width that follows.
        ratios: attribute → the two attributes of which it is the quotient.
    """

    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    convolutions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    divided: list[str] = field(default_factory=list)
    ratios: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def parts(self) -> set[str]:
        """Names of all parts that are cut."""
        cut = (self.rows, self.columns, self.heads, self.convolutions, self.norms, self.groups)
        return {name for names in cut for name in names}


def part(module: Any, name: str) -> Any:
    """Return a part by its dotted name; None if there is none."""
    for step in name.split("."):
        module = module.get(step) if isinstance(module, dict) else None
    return module


def outputs(linear: Any) -> int:
    """Return the number of rows of a linear layer, of experts too."""
    return int(linear.weight.shape[-2])


def inputs(linear: Any) -> int:
    """Return the number of columns of a linear layer, of experts too."""
    width = int(linear.weight.shape[-1])
    return width if "scales" not in linear else width * 32 // int(linear.bits)


def groups_of(linear: Any) -> int:
    """Return the values that share a scale; 1 for floats."""
    return 1 if "scales" not in linear else int(linear.group_size)


def divide(size: int, group: Group, words: str, unit: int = 1) -> int:
    """Return a rank's part of ``size``, in whole units.

    Raises:
        UnsupportedServingError: the ranks cannot have equal parts.
    """
    if size % (group.size() * unit):
        whole = f", in groups of {unit}" if unit > 1 else ""
        raise UnsupportedServingError(
            f"{words} is {size}{whole}, which {group.size()} ranks cannot divide equally; use a "
            "tensor_parallel_size that divides it."
        )
    return size // group.size()


def run(recipe: Recipe, module: Any, path: str, group: Group) -> None:
    """Cut a layer.

    Args:
        recipe: for this layer.
        module: the layer, changed in place.
        path: its path, for messages.
        group: the ranks.

    Raises:
        UnsupportedServingError: the ranks cannot have equal parts; nothing is cut.
    """
    for name, pieces in recipe.rows.items():
        for size in pieces:
            divide(size, group, f"the output of {path}.{name}")
    for name in recipe.columns:
        linear = part(module, name)
        divide(inputs(linear), group, f"the input of {path}.{name}", groups_of(linear))
    for name, pieces in recipe.convolutions.items():
        for size in pieces:
            divide(size, group, f"the channels of {path}.{name}")
    for name in recipe.groups:
        divide(module[name].groups, group, f"the groups of {path}.{name}")
    for name in recipe.divided:
        divide(getattr(module, name), group, f"{name} of {path}")

    for name, pieces in recipe.rows.items():
        segments = ends(pieces)
        module[name] = shard_linear(module[name], "all-to-sharded", segments=segments, group=group)
    for name in recipe.columns:
        module[name] = shard_linear(module[name], "sharded-to-all", group=group)
    for name in recipe.heads:
        _cut_heads(module, name, group)
    for name, pieces in recipe.convolutions.items():
        convolution, segments = part(module, name), ends(pieces)
        shard_inplace(convolution, lambda _, array, s=segments: (0, s), group=group)
        convolution.groups //= group.size()
    for name in recipe.norms:
        from mlx_lm.models.minimax import ShardedRMSNorm

        module[name] = ShardedRMSNorm.from_rms_norm(module[name], group=group)
    for name in recipe.groups:
        _cut_heads(module, name, group)
        module[name].groups //= group.size()
    for name in recipe.divided:
        setattr(module, name, getattr(module, name) // group.size())
    for name, (above, below) in recipe.ratios.items():
        setattr(module, name, getattr(module, above) // getattr(module, below))


def ends(pieces: Sequence[int]) -> Any:
    """Return the pieces as MLX's ``segments``."""
    if len(pieces) == 1:
        return 1
    return [sum(pieces[: n + 1]) for n in range(len(pieces) - 1)]


def _cut_heads(module: Any, name: str, group: Group) -> None:
    found = module[name]
    if isinstance(found, mx.array):
        module[name] = own_part(found, group)
        return
    for key, value in list(found.items()):
        if isinstance(value, mx.array):
            found[key] = own_part(value, group)


def own_part(array: mx.array, group: Group) -> mx.array:
    """Return this rank's part of the first axis that is longer than 1; lazy."""
    axis = next(n for n, size in enumerate(array.shape) if size > 1)
    return mx.contiguous(mx.split(array, group.size(), axis=axis)[group.rank()])


def is_small(module: Any) -> bool:
    """Whether a module has no parameter, or scalars only, as an activation has."""
    return all(array.size <= 1 for array in arrays(module))


def arrays(module: Any) -> Iterator[mx.array]:
    """Yield the parameters of a module."""
    for _, value in _flat(module.parameters()):
        yield value


def _flat(tree: Any) -> Any:
    from mlx.utils import tree_flatten

    return tree_flatten(tree)
