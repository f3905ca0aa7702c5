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
from vllm_moe_compat.plan.build import Build, Restriction, Span
from vllm_moe_compat.plan.cut import Cut
from vllm_moe_compat.plan.ops import SplitGateUp
from vllm_moe_compat.plan.packing import Packing

PARTS_OF_PACKED = ("scales", "biases")
"""Parameters that lie beside a packed ``weight``."""


def cut_of(name: str, cuts: Mapping[str, Cut]) -> Cut | None:
    """Return the cut of a tensor that has the name of a parameter, which may be packed."""
    module, _, kind = name.rpartition(".")
    return cuts.get(f"{module}.weight" if kind in PARTS_OF_PACKED else name)


def restricted(
    build: Build, cuts: Sequence[Cut | None], shapes: Sequence[Sequence[int]]
) -> list[Build] | None:
    """Return the builds that make a rank's part of the targets, and read no more.

    Combined gate and up become a build each: a restriction of both together reads all rows.

    Args:
        build: the build.
        cuts: of each target; None for a whole one.
        shapes: of each target, as the build makes it.

    Returns:
        One build for all targets, or one for each; None if they have to be made whole first.
    """
    first = cuts[0]
    if first is None or any(cut != first for cut in cuts) or first.factor != 1.0:
        return None
    shape, ends = shapes[0], first.scaled(shapes[0][first.axis])
    if ends is None or len(ends) != 1 or len(shape) < 2:
        return None
    both = build.held is not None and build.held.global_scale
    by_rows = first.axis == len(shape) - 2
    if by_rows and not both and build.ops and build.ops[-1] == SplitGateUp():
        (start, stop), size = ends[0], shape[-2]
        return [
            replace(build, target=name, others=(), ops=build.ops[:-1]).restricted(
                Restriction(rows=(start + number * size, stop + number * size))
            )
            for number, name in enumerate(build.targets)
        ]
    return [build.restricted(_restriction(first, ends[0], len(shape)))]


def _restriction(cut: Cut, span: Span, axes: int) -> Restriction:
    if cut.axis == axes - 1:
        return Restriction(columns=span)
    return Restriction(rows=span) if cut.axis == axes - 2 else Restriction(experts=span)


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
    """Run a build that cannot be restricted at once, for a part of its targets.

    A target in several spans is made span by span, and joined.

    Args:
        build: of a plan for these tensors.
        cuts: of each target; None for a whole one.
        shapes: of each target, as the build makes it.
        weights: name → array, mostly unread, or stored tensor; the sources are removed.
        dtype: dtype of dequantised weights.
        names: names of the results.
        formats: packed format of each result; None for floats.

    Returns:
        See ``make_build``.
    """
    first, made = cuts[0], {}
    if first is not None and len(first.spans) > 1:
        parts = [replace(first, spans=(span,)) for span in first.spans]
        builds = [restricted(build, [p] * len(cuts), shapes) for p in parts]
        if all(cut == first for cut in cuts) and all(b is not None and len(b) == 1 for b in builds):
            sources = {name: weights.pop(name) for name in build.sources}
            made_parts = [
                make_build(one, dict(sources), dtype, names=names, formats=formats)
                for several in builds
                for one in several or ()
            ]
            for name in list(made_parts[0]):
                made[name] = mx.concatenate([p.pop(name) for p in made_parts], axis=first.axis)
                settle([made[name]])
            return made
    made = make_build(build, weights, dtype, names=names, formats=formats)
    by_name = {name: cut for name, cut in zip(names, cuts, strict=True) if cut is not None}
    for name in list(made):
        if (cut := cut_of(name, by_name)) is not None:
            made[name] = part_of(name, made.pop(name), cut)
            settle([made[name]])
    return made


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
