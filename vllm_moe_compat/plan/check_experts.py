"""Check that the routed experts of every layer are complete and equal in shape and dtype.

Upstream would truncate, overwrite or fail with a list of parameter names. These findings name
the layer, the expert and the projection before any tensor is read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from vllm_moe_compat.checkpoint.config import expert_width
from vllm_moe_compat.checkpoint.experts import PROJECTIONS, ExpertBlock, is_transposed
from vllm_moe_compat.checkpoint.findings import CONVERT, Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import fold_numbers, layer_of
from vllm_moe_compat.dtypes import FLOATS
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.row import Moe, Row


def check_experts(layout: Layout, row: Row, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the faults of the checkpoint's routed experts."""
    hidden = expert_width(config) if layout.experts else None
    places: dict[str, str] = {}
    for block in layout.experts:
        if row.moe is None:
            for name in block.names():
                yield _unsupported(name, "is an expert's", f"the dense layers of {row.module}")
            continue
        layer = layer_of(block.path)
        place = f"layer {layer.number}" if layer else block.path
        if places.setdefault(place, block.path) != block.path:
            yield Finding(block.path, f"repeats {places[place]}", "one set of experts", rank=0)
        if block.packed:
            yield from _packed(layout, block)
            continue
        if len(block.layouts) > 1:
            layouts = ", ".join(block.layouts)
            yield Finding(block.path, f"has its experts twice ({layouts})", "one layout", rank=0)
        elif (block.per_expert or block.combined) and row.moe.source_of(block.path) is None:
            homes = " or ".join(row.moe.sources)
            yield _unsupported(block.path, "holds experts", f"them under {homes}")
        elif block.per_expert:
            yield from _per_expert(layout, row.moe, block, hidden)
        elif block.combined:
            yield from _combined(layout, row.moe, block, config)
        for name in block.unrecognized:
            yield _unsupported(name, "is in no known layout of experts", "an expert weight")


def _packed(layout: Layout, block: ExpertBlock) -> Iterator[Finding]:
    """Yield packed experts that are mixed with float experts; others are left to mlx-lm."""
    weights = [
        *(n for p, ns in block.per_expert.items() if not p.endswith(".bias") for n in ns.values()),
        *(name for part, name in block.combined.items() if not part.endswith(".bias")),
    ]
    if any(layout.weights[name].dtype in FLOATS for name in weights):
        for name in block.packed:
            yield _unsupported(name, "is packed", "floats like the layer's other experts")


def _wanted(moe: Moe, found: Collection[str]) -> list[str]:
    """Return the required parts, with gate and up joined or separate as in ``found``."""
    separate = any(part in found for part in ("gate", "up"))
    joined = moe.gated and ("gate_up" in found or not separate)
    wanted = ["gate_up", "down"] if joined else [part for part, _ in moe.projections]
    biases = {part.removesuffix(".bias") for part in found if part.endswith(".bias")}
    return wanted + [f"{part}.bias" for part in wanted if biases]


def _per_expert(
    layout: Layout, moe: Moe, block: ExpertBlock, hidden: int | None
) -> Iterator[Finding]:
    wanted = _wanted(moe, block.per_expert)
    words = {PROJECTIONS[s]: s for s in sorted(block.spelling) if s in PROJECTIONS}
    known = [words.get(part, part) for part in wanted if not part.endswith(".bias")]
    for part in block.per_expert.keys() - set(wanted):
        for name in block.per_expert[part].values():
            yield _unsupported(name, "is an unknown projection", f"one of {', '.join(known)}")

    present = {e for projection in block.per_expert.values() for e in projection}
    count = layout.num_experts or max(present) + 1
    says = " by the config" if layout.num_experts else ""
    experts = f"experts 0…{count - 1}{says}"
    complete = False
    if len(present) != max(present) + 1:
        found = f"has non-contiguous indices {fold_numbers(present)}"
        yield Finding(block.path, found, experts, rank=1)
    elif len(present) != count:
        yield Finding(block.path, f"has the experts {fold_numbers(present)}", experts, rank=1)
    else:
        complete = True
    shapes: dict[str, tuple[int, ...]] = {}
    for part in wanted:
        role, _, bias = part.partition(".")
        projection = f"{words.get(role, dict(moe.projections).get(role, role))}.{bias or 'weight'}"
        names = block.per_expert.get(part, {})
        if not names:
            yield Finding(f"{block.path}.*.{projection}", "is missing for all experts", "one each")
            complete = False
            continue
        for missing in sorted(present - names.keys()):
            yield Finding(
                f"{block.path}.{missing}.{projection}", "is missing", "one for every expert"
            )
        yield from _unequal_experts(
            layout, projection.removesuffix(".weight"), list(names.values())
        )
        if not bias:
            (_, shape), _ = _count_specs(layout.weights, names.values()).most_common(1)[0]
            shapes[f"{block.path}.*.{words.get(part, part)}.weight"] = shape
    if complete:
        yield from _orientation(shapes, hidden, joined="gate_up" in wanted)


def _unequal_experts(layout: Layout, projection: str, names: list[str]) -> Iterator[Finding]:
    """Yield the experts whose weight, or a part of it, differs in dtype or shape from most."""
    specs = _count_specs(layout.weights, names)
    usual, _ = specs.most_common(1)[0]
    if usual[0] not in FLOATS and layout.numbers.isdisjoint(names):
        for name in names:
            yield _unsupported(name, f"is {usual[0]}", "bf16, f16, f32 or block FP8")
        return
    yield from _unequal_tensors(layout.weights, projection, names, specs)
    parts = defaultdict[str, list[str]](list)
    for name in names:
        for role, part in layout.numbers.stored(name).parts:
            parts[role].append(part)
    for each in parts.values():
        found = _count_specs(layout.tensors, each)
        yield from _unequal_tensors(layout.tensors, projection, each, found)


def _unequal_tensors(
    tensors: Mapping[str, TensorInfo],
    projection: str,
    names: list[str],
    specs: Counter[tuple[str, tuple[int, ...]]],
) -> Iterator[Finding]:
    """Yield the tensors whose spec is not the most frequent of ``specs``."""
    if len(specs) == 1:
        return
    usual, _ = specs.most_common(1)[0]
    for name in names:
        info = tensors[name]
        if (info.dtype, info.shape) != usual:
            yield Finding(
                name,
                f"is {info.dtype} {list(info.shape)}",
                f"the {usual[0]} {list(usual[1])} of the other experts' {projection}",
                rank=3,
            )


def _count_specs(
    tensors: Mapping[str, TensorInfo], names: Iterable[str]
) -> Counter[tuple[str, tuple[int, ...]]]:
    """Count the tensors of each dtype and shape."""
    return Counter([((info := tensors[name]).dtype, info.shape) for name in names])


def _orientation(
    shapes: Mapping[str, tuple[int, ...]], hidden: int | None, *, joined: bool
) -> Iterator[Finding]:
    """Check gate ``[I, H]``, up ``[I, H]`` and down ``[H, I]`` against each other."""
    *into, out = shapes
    first = shapes[into[0]]
    if len(first) != 2 or (hidden is not None and first[1] != hidden):
        width = f"[*, {hidden}]" if hidden is not None else "two axes"
        yield Finding(into[0], f"is {list(first)}", width)
        return
    for projection in into[1:]:
        if shapes[projection] != first:
            yield Finding(projection, f"is {list(shapes[projection])}", f"{list(first)}")
    expected = (first[1], first[0] // 2 if joined else first[0])
    if shapes[out] != expected:
        yield Finding(out, f"is {list(shapes[out])}", f"{list(expected)}")


def _combined(
    layout: Layout, moe: Moe, block: ExpertBlock, config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Check ``gate_up_proj`` ``[E, 2I, H]`` against ``down_proj`` ``[E, H, I]``, or transposed."""
    for part in _wanted(moe, block.combined):
        if part not in block.combined:
            role, _, bias = part.partition(".")
            spelled = next((s for s in sorted(block.spelling) if PROJECTIONS[s] == role), None)
            name = spelled or {"gate_up": "gate_up_proj"}.get(role) or dict(moe.projections)[role]
            name = f"{block.path}.{name}{'_bias' if bias else ''}"
            yield Finding(name, "is missing", "all projections of the layer")
            return
    into = "gate_up" if "gate_up" in block.combined else "up"
    name, down = block.combined[into], block.combined["down"]
    shape, beside = layout.weights[name].shape, layout.weights[down].shape
    hidden = expert_width(config)
    if is_stored_transposed(moe, block, layout, config) is not None:
        if layout.num_experts and shape[0] != layout.num_experts:
            expected = f"{layout.num_experts} by the config"
            yield Finding(name, f"holds {shape[0]} experts", expected)
        return
    both = "2 x intermediate" if into == "gate_up" else "intermediate"
    if len(shape) != 3 or (hidden is not None and hidden not in shape[1:]):
        yield Finding(name, f"is {list(shape)}", f"[experts, {both}, {hidden or 'hidden'}]")
        return
    experts, rows, columns = shape
    if moe.transposed if hidden is None else shape[2] != hidden:
        rows, columns = columns, rows
    inner = rows // 2 if into == "gate_up" else rows
    fitting = [experts, columns, inner] if columns == shape[2] else [experts, inner, columns]
    yield Finding(down, f"is {list(beside)}", f"{fitting} beside a {into} of {list(shape)}")


def is_stored_transposed(
    moe: Moe, block: ExpertBlock, layout: Layout, config: Mapping[str, Any]
) -> bool | None:
    """Whether combined experts are ``[E, H, 2I]``, by shapes, config and convention.

    The row's convention decides if neither the shapes nor the config's width do.

    Returns:
        None if the shapes contradict each other or the config.
    """
    hidden = expert_width(config)
    down = layout.weights[block.combined["down"]].shape
    if "gate_up" in block.combined:
        gate_up = layout.weights[block.combined["gate_up"]].shape
        transposed = is_transposed(gate_up, down)
        if transposed is None or hidden in (None, gate_up[1 if transposed else 2]):
            return transposed
        return None
    up = layout.weights[block.combined["up"]].shape
    if len(up) != 3 or down != (up[0], up[2], up[1]) or hidden not in (None, *up[1:]):
        return None
    if hidden is None or up[1] == up[2]:
        return moe.transposed
    return up[1] == hidden


def _unsupported(name: str, found: str, expected: str) -> Finding:
    return Finding(name, found, expected, remedy=CONVERT, error=UnsupportedCheckpointError, rank=1)
