"""Which part of each parameter a rank holds, found out by cutting a model that has no values.

Each class of mlx-lm's cuts in its own way: by halves, by segments, head by head, with heads
repeated. So nothing about it is written down here. A skeleton is cut twice. The first time, its
parameters have their shapes only, and the shapes that change tell the axis. The second time, a
parameter has its own row numbers as values along that axis, and length 1 along the others, so
the result lists the rows that the rank holds. Ones that come back as another number tell what
a parameter is multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.execute.cut_build import cut_of, part_of
from vllm_moe_compat.plan.build import Span
from vllm_moe_compat.plan.cut import Cut
from vllm_moe_compat.ranks.group import Group, RankOf
from vllm_moe_compat.ranks.shard import shard

Shape = tuple[int, ...]


def cuts_of(make: Callable[[], Any], group: Group) -> dict[str, Cut]:
    """Return the cuts of a rank.

    Args:
        make: returns a new model, its parameters unread floats.
        group: the ranks; nothing is sent.

    Returns:
        Name of a parameter → its cut; parameters that the rank holds whole are left out.

    Raises:
        UnsupportedServingError: the ranks cannot have equal parts.
    """
    seat = RankOf(group.rank(), group.size())
    model = make()
    before = _shapes(model)
    shard(model, seat)
    after = _shapes(model)
    axes = {name: _axis(name, shape, after[name]) for name, shape in before.items()}
    del model
    numbered = make()
    # A list of pairs would be flattened by key and lose the order; names are unique.
    numbers = {name: _numbers(shape, axes[name]) for name, shape in before.items()}
    numbered.update(tree_unflatten(list(numbers.items())))
    shard(numbered, seat)
    found = {}
    for name, array in tree_flatten(numbered.parameters()):
        if axes[name] is None:
            array = array[(0,) * array.ndim]
        cut = _cut(before[name], axes[name], np.array(array).reshape(-1))
        if cut is not None:
            found[name] = cut
    return found


def new_like(model: Any) -> Callable[[], Any]:
    """Return what makes further models of the same class and arguments.

    Raises:
        UnsupportedServingError: the model does not keep its arguments.
    """
    arguments = next((value for value in vars(model).values() if is_dataclass(value)), None)
    if arguments is None:
        raise UnsupportedServingError(
            f"{type(model).__module__} cannot be divided over ranks, since its model does not "
            "keep the arguments that it was made with; use tensor_parallel_size 1."
        )
    return lambda: type(model)(arguments)


def _shapes(model: Any) -> dict[str, Shape]:
    return {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}


def _axis(name: str, before: Shape, after: Shape) -> int | None:
    """Return the axis that became shorter, or longer; None for none.

    Raises:
        UnsupportedServingError: more than one did.
    """
    if before == after:
        return None
    if len(before) == len(after):
        changed = [n for n, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    else:  # A class that flattens a parameter of one long axis.
        changed = [n for n, size in enumerate(before) if size > 1]
    if len(changed) != 1:
        raise UnsupportedServingError(
            f"{name} is cut from {list(before)} to {list(after)}, along more than one axis, which "
            "no load can follow; use tensor_parallel_size 1."
        )
    return changed[0]


def _numbers(shape: Shape, axis: int | None) -> mx.array:
    if axis is None:
        # The recipes compare sizes, so it keeps its shape; a view of one number takes no memory.
        return mx.broadcast_to(mx.ones(1), shape)
    thin = [1] * len(shape)
    thin[axis] = shape[axis]
    return mx.arange(shape[axis], dtype=mx.float32).reshape(thin)


def _cut(whole: Shape, axis: int | None, values: np.ndarray[Any, Any]) -> Cut | None:
    if axis is None:
        factor = float(values[0]) if values.size else 1.0
        return None if factor == 1.0 else Cut(whole, factor=factor)
    return Cut(whole, axis, _spans(values.astype(int)))


def _spans(numbers: np.ndarray[Any, Any]) -> tuple[Span, ...]:
    """Return the runs of consecutive numbers."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    runs = np.split(numbers, breaks)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs)


def take(name: str, array: mx.array, cuts: Mapping[str, Cut]) -> mx.array:
    """Return a rank's part of a tensor that has the name of a parameter; lazy.

    Raises:
        UnsupportedServingError: a packed tensor's part does not lie between its groups.
    """
    cut = cut_of(name, cuts)
    return array if cut is None else part_of(name, array, cut)
