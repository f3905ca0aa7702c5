"""Whether the routed experts of every layer are all there and all alike.

Upstream would truncate, overwrite or fail with a list of parameter names; here
the layer, the expert and the projection are named, before anything is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.layout import ExpertBlock, Layout, TensorInfo
from vllm_moe_compat.layout.config import whole_number
from vllm_moe_compat.layout.names import fold_numbers
from vllm_moe_compat.plan.findings import CONVERT, Finding
from vllm_moe_compat.plan.row import Moe, Row

_STACKABLE = ("F8_E4M3", "BF16", "F16", "F32")


def check_experts(layout: Layout, row: Row, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with the checkpoint's routed experts."""
    hidden = whole_number(config, "hidden_size") if layout.experts else None
    places: dict[str, str] = {}
    for block in layout.experts:
        if row.moe is None:
            for name in block.names():
                yield _unsupported(name, "is an expert's", f"the dense layers of {row.module}")
            continue
        place = block.parent[block.parent.find("layers.") :]
        if places.setdefault(place, block.parent) != block.parent:
            yield Finding(block.parent, f"repeats {places[place]}", "one set of experts", rank=0)
        if len(block.forms) > 1:
            forms = ", ".join(block.forms)
            yield Finding(block.parent, f"has its experts twice ({forms})", "one layout", rank=0)
        elif (block.per_expert or block.combined) and not _at_home(row.moe, block):
            place = f"{block.parent}.experts"
            yield _unsupported(place, "holds experts", f"them under {row.moe.source}")
        elif block.per_expert:
            yield from _per_expert(layout, row.moe, block, hidden)
        elif block.combined:
            yield from _combined(layout, block, hidden)
        for name in block.other:
            yield _unsupported(name, "is in none of the known forms of experts", "an expert weight")


def _at_home(moe: Moe, block: ExpertBlock) -> bool:
    return f".{block.parent}.experts".endswith(f".{moe.source}")


def _per_expert(
    layout: Layout, moe: Moe, block: ExpertBlock, hidden: int | None
) -> Iterator[Finding]:
    known = [source for source, _ in moe.projections]
    for projection in block.per_expert.keys() - set(known):
        for name in block.per_expert[projection].values():
            yield _unsupported(name, "is an unknown projection", f"one of {', '.join(known)}")

    present = {e for projection in block.per_expert.values() for e in projection}
    count = layout.num_experts or max(present) + 1
    says = " by the config" if layout.num_experts else ""
    experts = f"experts 0…{count - 1}{says}"
    place = f"{block.parent}.experts"
    complete = False
    if len(present) != max(present) + 1:
        found = f"has non-contiguous indices {fold_numbers(present)}"
        yield Finding(place, found, experts, rank=1)
    elif len(present) != count:
        yield Finding(place, f"has the experts {fold_numbers(present)}", experts, rank=1)
    else:
        complete = True
    for projection in known:
        names = block.per_expert.get(projection, {})
        if not names:
            yield Finding(
                f"{place}.*.{projection}.weight", "is missing for all experts", "one each"
            )
            complete = False
            continue
        for missing in sorted(present - names.keys()):
            yield Finding(
                f"{place}.{missing}.{projection}.weight", "is missing", "one for every expert"
            )
        yield from _alike(layout, projection, list(names.values()))
    if complete:
        shapes = {p: _usual(layout, block.per_expert[p].values()).shape for p in known}
        yield from _orientation(block.parent + ".experts.*", shapes, known, hidden)


def _alike(layout: Layout, projection: str, names: list[str]) -> Iterator[Finding]:
    """Yield the experts whose shape or dtype is not that of most."""
    usual = _usual(layout, names)
    if usual.dtype not in _STACKABLE:
        for name in names:
            yield _unsupported(name, f"is {usual.dtype}", "bf16, f16, f32 or block FP8")
        return
    for kind in ("weight", "scale"):
        if kind == "scale":
            names = [layout.fp8.pairs[name] for name in names if name in layout.fp8.pairs]
            if not names:
                return
            usual = _usual(layout, names)
        for name in names:
            info = layout.tensors[name]
            if (info.dtype, info.shape) != (usual.dtype, usual.shape):
                yield Finding(
                    name,
                    f"is {info.dtype} {list(info.shape)}",
                    f"the {usual.dtype} {list(usual.shape)} of the other experts' {projection}",
                    rank=3,
                )


def _usual(layout: Layout, names: Any) -> TensorInfo:
    infos = [layout.tensors[name] for name in names]
    (dtype, shape), _ = Counter((info.dtype, info.shape) for info in infos).most_common(1)[0]
    return TensorInfo(dtype, shape)


def _orientation(
    place: str, shapes: Mapping[str, tuple[int, ...]], known: list[str], hidden: int | None
) -> Iterator[Finding]:
    """Check gate ``[I, H]``, up ``[I, H]`` and down ``[H, I]`` against each other."""
    *into, out = known
    first = shapes[into[0]]
    if len(first) != 2 or (hidden is not None and first[1] != hidden):
        width = f"[*, {hidden}]" if hidden is not None else "two axes"
        yield Finding(f"{place}.{into[0]}.weight", f"is {list(first)}", width)
        return
    for projection in into[1:]:
        if shapes[projection] != first:
            yield Finding(
                f"{place}.{projection}.weight", f"is {list(shapes[projection])}", f"{list(first)}"
            )
    if shapes[out] != first[::-1]:
        yield Finding(f"{place}.{out}.weight", f"is {list(shapes[out])}", f"{list(first[::-1])}")


def _combined(layout: Layout, block: ExpertBlock, hidden: int | None) -> Iterator[Finding]:
    """Check ``gate_up_proj`` ``[E, 2I, H]`` against ``down_proj`` ``[E, H, I]``."""
    for projection in ("gate_up_proj", "down_proj"):
        if projection not in block.combined:
            yield Finding(
                f"{block.parent}.experts.{projection}", "is missing", "it beside the other one"
            )
            return
    gate_up = layout.tensors[block.combined["gate_up_proj"]].shape
    down = layout.tensors[block.combined["down_proj"]].shape
    name = block.combined["gate_up_proj"]
    if len(gate_up) != 3 or (hidden is not None and gate_up[2] != hidden):
        yield Finding(
            name, f"is {list(gate_up)}", f"[experts, 2 x intermediate, {hidden or 'hidden'}]"
        )
        return
    experts, rows, columns = gate_up
    if layout.num_experts and experts != layout.num_experts:
        yield Finding(name, f"holds {experts} experts", f"{layout.num_experts} by the config")
    if rows % 2 or down != (experts, columns, rows // 2):
        yield Finding(
            block.combined["down_proj"],
            f"is {list(down)}",
            f"{[experts, columns, rows // 2]} beside a gate_up_proj of {list(gate_up)}",
        )


def _unsupported(name: str, found: str, expected: str) -> Finding:
    return Finding(name, found, expected, remedy=CONVERT, error=UnsupportedCheckpointError, rank=1)
