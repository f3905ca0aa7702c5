"""Make the part of a build's targets that a rank holds.

Where the operations map rows to rows and columns to columns, the build is restricted, once for
each span, so only the sources' bytes for that part are read. Other targets are small, such as
biases, or come of operations on a few tensors per layer: they are made whole and cut.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.execute.laziness import settle
from vllm_moe_compat.plan.build import Build, Restriction
from vllm_moe_compat.plan.cut import Cut
from vllm_moe_compat.plan.ops import SplitGateUp
from vllm_moe_compat.plan.packing import Packing

PARTS_OF_PACKED = ("scales", "biases")
"""Parameters that lie beside a packed ``weight``."""


def cut_of(name: str, cuts: Mapping[str, Cut]) -> Cut | None:
    """Return the cut of a tensor that has the name of a parameter, which may be packed."""
    module, _, kind = name.rpartition(".")
    return cuts.get(f"{module}.weight" if kind in PARTS_OF_PACKED else name)


def restrictions(build: Build, cut: Cut, shape: Sequence[int]) -> list[Restriction] | None:
    """Return the restrictions of a build that give a cut of its targets.

    Args:
        build: the build.
        cut: the same for all of its targets.
        shape: shape of a target, as the build makes it.

    Returns:
        One for each span; None if the build has to be made whole.
    """
    ends = cut.scaled(shape[cut.axis])
    if cut.factor != 1.0 or len(shape) < 2 or ends is None:
        return None
    axes = {len(shape) - 2: "rows", len(shape) - 1: "columns"} | (
        {0: "experts"} if len(shape) == 3 else {}
    )
    return [Restriction(**{axes[cut.axis]: span}) for span in ends]


def make_cut(
    build: Build,
    cuts: Sequence[Cut | None],
    shapes: Sequence[Sequence[int]],
    weights: MutableMapping[str, Any],
    dtype: str,
    *,
    names: Sequence[str],
    formats: Sequence[Packing | None],
) -> dict[str, mx.array]:
    """Run a build for a part of its targets; its sources are removed from ``weights``.

    Args:
        build: of a plan for these tensors.
        cuts: of each target; None for a whole one.
        shapes: of each target, as the build makes it.
        weights: name → array, mostly unread, or stored tensor.
        dtype: dtype of dequantised weights.
        names: names of the results.
        formats: packed format of each result; None for floats.

    Returns:
        See ``make_build``.
    """
    first = cuts[0]
    same = first is not None and all(cut == first for cut in cuts)
    spans = restrictions(build, first, shapes[0]) if same and first is not None else None
    if spans is None:
        made = make_build(build, weights, dtype, names=names, formats=formats)
        by_name = {name: cut for name, cut in zip(names, cuts, strict=True) if cut is not None}
        for name in list(made):
            if (cut := cut_of(name, by_name)) is not None:
                made[name] = part_of(name, made.pop(name), cut)
                settle([made[name]])
        return made
    assert first is not None
    sources = {name: weights.pop(name) for name in build.sources}
    made = {}
    for number, (one, offset) in enumerate(_apart(build, shapes[0], first)):
        chosen = slice(None) if len(one.targets) == len(names) else slice(number, number + 1)
        parts = [
            make_build(
                one.restricted(_moved(span, offset)),
                dict(sources),
                dtype,
                names=names[chosen],
                formats=formats[chosen],
            )
            for span in spans
        ]
        for name in list(parts[0]):
            several = [part.pop(name) for part in parts]
            made[name] = several[0] if len(several) == 1 else mx.concatenate(several, first.axis)
            settle([made[name]])
    return made


def _apart(build: Build, shape: Sequence[int], cut: Cut) -> list[tuple[Build, int]]:
    """Return the builds that make the targets, each with the number of rows before its own.

    Of combined gate and up, the rows of each are read by themselves: a restriction of both
    together would read all rows.
    """
    last = build.ops[-1] if build.ops else None
    by_rows = cut.axis == len(shape) - 2
    both = build.held is not None and build.held.global_scale
    if not by_rows or both or last != SplitGateUp():
        return [(build, 0)]
    return [
        (replace(build, target=name, others=(), ops=build.ops[:-1]), number * shape[-2])
        for number, name in enumerate(build.targets)
    ]


def _moved(part: Restriction, offset: int) -> Restriction:
    if part.rows is None or not offset:
        return part
    return replace(part, rows=(part.rows[0] + offset, part.rows[1] + offset))


def part_of(name: str, array: mx.array, cut: Cut) -> mx.array:
    """Return the part of a tensor, which may be words or scales of a packed one; lazy.

    Raises:
        UnsupportedServingError: the part does not lie between words or groups.
    """
    if cut.factor != 1.0:
        array = (array.astype(mx.float32) * cut.factor).astype(array.dtype)
    if not cut.spans:
        return array
    spans = cut.scaled(array.shape[cut.axis])
    if spans is None:
        raise between(name, cut)
    lead = (slice(None),) * cut.axis
    parts = [array[(*lead, slice(*span))] for span in spans]
    return mx.contiguous(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=cut.axis))


def between(name: str, cut: Cut) -> UnsupportedServingError:
    """Return the error of a packed tensor whose groups a cut goes through."""
    return UnsupportedServingError(
        f"{name} is packed in groups, and the {cut.size} of {cut.whole[cut.axis]} columns that "
        "each rank would hold are not whole groups; use another tensor_parallel_size, or a "
        "smaller group."
    )
