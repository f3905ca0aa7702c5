"""Plan the tensors to make, from a layout and a registry row.

A ``Build`` names its target with the checkpoint's own prefix. Prefixes, and everything else
that upstream's ``sanitize`` does correctly, are left to ``sanitize``; so no prefix is applied
twice, and a tensor that upstream handles has no ``Build``. The whole checkpoint is checked
before a plan is returned.

The plan stacks the experts of all layers or of none, since several families' ``sanitize``
looks only at the first layer to find out whether experts are stacked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from vllm_moe_compat.checkpoint.config import whole_number
from vllm_moe_compat.checkpoint.experts import ExpertBlock
from vllm_moe_compat.checkpoint.findings import refuse
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.numbers import Numbers
from vllm_moe_compat.checkpoint.operations import Op
from vllm_moe_compat.errors import LayoutError
from vllm_moe_compat.families.row import Moe, Row
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.check_experts import check_experts, is_stored_transposed
from vllm_moe_compat.plan.kept import kept_blocks, kept_numbers
from vllm_moe_compat.plan.norms import norms
from vllm_moe_compat.plan.ops import (
    SplitGateUp,
    SplitLatent,
    SplitRows,
    StackExperts,
    Transpose,
)
from vllm_moe_compat.plan.tensor_names import TensorNames
from vllm_moe_compat.plan.upstream import digests_block, digests_numbers, keeps_numbers


@dataclass(frozen=True, slots=True)
class Plan:
    """All changes to a checkpoint's tensors before upstream's ``sanitize``.

    Attributes:
        module: import path of the mlx-lm module.
        words: the layout in a message.
        builds: the tensors to make, layer by layer.
        drops: names of tensors to remove because nothing reads them.
        ignored: names of extra tensors that the module's ``sanitize`` drops by itself. They are
            removed first, since a wrapper of another library may judge them.
        widen: names of half-precision tensors that ``sanitize`` computes with; float32 serving
            widens them first.
        experts: routed experts per layer, if the plan stacks them; else 0.
        stacked: number of layers whose experts the plan stacks.
        dequantized: number of weights in a stored number form that the plan dequantises.
        digested: number of such weights that upstream dequantises or keeps.
        made_upstream: the names of those that it dequantises, to bfloat16.
        names: changes of names that precede everything else.
        held: number of such weights that MLX holds as they are stored.
        complete: whether every tensor that ``sanitize`` does not compute with has a build, one of
            no operations if nothing is to do. Then a part of any of them can be made by itself.
    """

    module: str
    words: str
    builds: tuple[Build, ...] = ()
    drops: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    widen: tuple[str, ...] = ()
    experts: int = 0
    stacked: int = 0
    dequantized: int = 0
    digested: int = 0
    made_upstream: frozenset[str] = frozenset()
    names: TensorNames = field(default_factory=TensorNames)
    held: int = 0
    complete: bool = False

    @property
    def empty(self) -> bool:
        """Whether the plan changes nothing."""
        return not self.builds and not self.drops


def make_plan(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    *,
    split: bool = False,
    exact: bool = False,
    direct: bool = False,
    checked: bool = False,
    hold: bool = False,
    complete: bool = False,
    released: bool = False,
) -> Plan:
    """Plan how the module of ``row`` gets its tensors from this checkpoint.

    Args:
        layout: the checkpoint's layout.
        row: the module's row.
        config: the effective config.
        split: whether the plan stacks all experts, even those that upstream stacks. Needed if
            experts are quantised while loading, since upstream does not stack scales.
        exact: whether the plan dequantises even if upstream does, because upstream multiplies
            in bfloat16 and another dtype is served.
        direct: whether the tensors came without a preceding ``load_config``. Experts that
            upstream stacks are then not checked.
        checked: whether the caller has checked numbers and experts.
        hold: whether weights stay packed where MLX can hold them as they are stored.
        complete: see ``Plan``; implies ``split``, for combined experts too.
        released: see ``norms``.

    Raises:
        LayoutError: the tensors contradict each other or the config.
        UnsupportedCheckpointError: a layout or number form is not supported.
    """
    numbers = layout.numbers
    if keeps_numbers(row, layout):
        digested = len(numbers.weights)
        ignored = tuple(sorted(layout.ignored))
        builds: list[Build] = []
        if complete:
            builds.extend(kept_numbers(layout, row))
            done = {name for build in builds for name in build.sources}
            builds.extend(_unchanged(layout, done.union(numbers.unused)))
        return Plan(
            row.module,
            layout.words,
            builds=tuple(builds),
            drops=numbers.unused,
            ignored=ignored,
            digested=digested,
            complete=complete,
        )
    split = split or complete
    digested = digests_numbers(row, layout) and not split and not exact
    blocks = [b for b in layout.experts if b.per_expert or (b.combined and not b.packed)]
    stacking = row.moe is not None and any(
        complete
        or (split and (b.per_expert or _is_stored(b, numbers)))
        or not digests_block(row.moe, b, layout)
        or (_is_stored(b, numbers) and not digested)
        for b in blocks
    )
    if not checked:
        findings = check_experts(layout, row, config) if stacking or not direct else ()
        refuse([*numbers.findings(), *findings], layout.tensors)
    digested = digested and not stacking
    stored = set[str]() if digested else set(numbers.weights)

    builds = []
    experts = 0
    for block in blocks if stacking else ():
        assert row.moe is not None
        for build in _stack(row.moe, block, layout, config, stored):
            builds.append(build)
            if len(build.weights) > 1:
                experts = len(build.weights)
            elif not experts:
                experts = layout.tensors[build.weights[0]].shape[0]
    done = {name for build in builds for name in build.sources}
    builds.extend(_other_builds(layout, row, config, stored, done))
    shifts, widen, returns_early = norms(layout, row, stacking=stacking, released=released)
    builds.extend(Build(name, (name,), (), (op,)) for name, op in shifts)
    drops = (row.ignored if returns_early else row.dropped_here).of(config).select(layout.ignored)
    if complete:
        builds.extend(kept_blocks(layout, row))
        done = {name for build in builds for name in build.sources}
        builds.extend(_unchanged(layout, done.union(numbers.unused, widen)))
    # Layer by layer. Sorting is stable, so the order within a layer stays.
    order = {layer: n for n, layer in enumerate(dict.fromkeys(b.layer for b in builds))}
    builds.sort(key=lambda build: order[build.layer])
    if hold:
        builds = [_held(build, row) for build in builds]
    held = sum(len(build.weights) for build in builds if build.held is not None)
    return Plan(
        module=row.module,
        words=layout.words,
        builds=tuple(_renamed(builds, row)),
        drops=(*numbers.unused, *sorted(drops)),
        ignored=tuple(sorted(layout.ignored - drops)),
        widen=widen,
        experts=experts,
        stacked=len(blocks) if stacking else 0,
        dequantized=0 if digested else len(numbers.weights) - held,
        digested=len(numbers.weights) if digested else 0,
        made_upstream=frozenset(numbers.weights) if digested else frozenset(),
        held=held,
        complete=complete,
    )


def _unchanged(layout: Layout, done: Collection[str]) -> Iterator[Build]:
    """Yield builds without operations for the tensors that are not ``done``."""
    return (Build(name, (name,), (), ()) for name in layout.tensors if name not in done)


def _held(build: Build, row: Row) -> Build:
    """Return the build with the format in which MLX holds its targets, if there is one.

    Words can be stacked and cut into rows, but neither transposed nor split within a row, and
    no ``sanitize`` can compute with them.
    """
    dequantize = build.dequantize
    if dequantize is None or dequantize.held is None or build.target.endswith(row.computed):
        return build
    moved = (op for op in build.ops if op is not dequantize)
    if not all(
        isinstance(op, StackExperts) or (isinstance(op, SplitGateUp) and op.axis == -2)
        for op in moved
    ):
        return build
    return replace(build, held=dequantize.held)


def _is_stored(block: ExpertBlock, numbers: Numbers) -> bool:
    """Whether a layer has experts in a stored number form."""
    return any(
        name in numbers.weights
        for names in (
            block.combined.values(),
            *(experts.values() for experts in block.per_expert.values()),
        )
        for name in names
    )


def _build(
    numbers: Numbers,
    targets: Sequence[str],
    weights: Sequence[str],
    before: Sequence[Op],
    after: Sequence[Op],
    *,
    stored: bool,
) -> Build:
    """Return a build of equal weights; stored ones are dequantised after ``before``."""
    if not stored:
        return Build(targets[0], tuple(weights), (), (*before, *after), tuple(targets[1:]))
    dequantize = numbers.dequantize(weights[0])
    assert dequantize is not None, "stored weights have a number form"
    each = [numbers.stored(weight) for weight in weights]
    roles = [role for role, _ in each[0].parts]
    return Build(
        targets[0],
        tuple(one.tensor for one in each),
        tuple((role, tuple(one.parts[n][1] for one in each)) for n, role in enumerate(roles)),
        (*before, dequantize, *after),
        tuple(targets[1:]),
    )


def _stack(
    moe: Moe,
    block: ExpertBlock,
    layout: Layout,
    config: Mapping[str, Any],
    stored: set[str],
) -> Iterator[Build]:
    """Yield the builds of one layer's stacked projections; remove its weights from ``stored``."""
    source = moe.source_of(block.path)
    assert source is not None, "check_experts refuses other paths"
    root = (block.path.removesuffix(source) if source else f"{block.path}.") + moe.target
    projections = dict(moe.projections)
    # All projections of a layer have the same orientation.
    transposed = bool(block.combined) and is_stored_transposed(moe, block, layout, config)
    groups: list[tuple[str, tuple[str, ...], tuple[Op, ...]]] = [
        (part, tuple(names[e] for e in sorted(names)), (StackExperts(len(names)),))
        for part, names in block.per_expert.items()
    ] or [(part, (name,), ()) for part, name in block.combined.items()]
    order = ("gate_up", "gate", "up", "down")
    for part, weights, before in sorted(groups, key=lambda g: order.index(g[0].partition(".")[0])):
        name, _, bias = part.partition(".")
        kind = "bias" if bias else "weight"
        after: tuple[Op, ...] = (Transpose(),) if transposed and not bias else ()
        targets = [f"{root}.{projections[name]}.{kind}"] if name != "gate_up" else []
        if name == "gate_up":
            after += (SplitGateUp(moe.interleaved, -1 if bias else -2),)
            targets = [f"{root}.{projections[p]}.{kind}" for p in ("gate", "up")]
        here = weights[0] in stored
        stored.difference_update(weights)
        yield _build(layout.numbers, targets, weights, before, after, stored=here)


def _other_builds(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    stored: set[str],
    done: set[str],
) -> Iterator[Build]:
    """Yield the builds of all other weights that are dequantised, split or renamed."""
    names = layout.weights if row.renames or row.splits or row.latent else layout.numbers.weights
    for name in names:
        if layout.numbers.stored(name).tensor in done:
            continue
        after: tuple[Op, ...] = ()
        targets: tuple[str, ...] = (name,)
        for end, parts in row.splits:
            if name.endswith(end):
                after += (SplitRows(len(parts)),)
                targets = tuple(name.removesuffix(end) + part for part in parts)
        if row.latent and name.endswith(".kv_b_proj.weight"):
            after += (_split_latent(layout, name, config),)
            module = name.removesuffix("kv_b_proj.weight")
            targets = (f"{module}embed_q.weight", f"{module}unembed_out.weight")
        if name in stored or after or rename(row, name) != name:
            yield _build(layout.numbers, targets, (name,), (), after, stored=name in stored)


def _split_latent(layout: Layout, name: str, config: Mapping[str, Any]) -> SplitLatent:
    """Return the operation that splits ``kv_b_proj``.

    Raises:
        LayoutError: its rows are not the config's number of heads with keys and values.
    """
    heads = whole_number(config, "num_attention_heads") or 0
    keys = whole_number(config, "qk_nope_head_dim") or 0
    info = layout.weights[name]
    rows = info.shape[0] if len(info.shape) == 2 else 0
    if not heads or not keys or rows % heads or rows // heads <= keys:
        raise LayoutError(
            f"{info.file or 'the checkpoint'}: {name} is {list(info.shape)}, where the rows of "
            f"{heads} heads with more than {keys} each were expected, as num_attention_heads and "
            "qk_nope_head_dim of config.json say; download the config again."
        )
    return SplitLatent(heads, keys)


@lru_cache(maxsize=64)
def _patterns(row: Row) -> tuple[re.Pattern[str], list[tuple[re.Pattern[str], str]]]:
    each = [(re.compile(old), new) for old, new in row.renames]
    return re.compile("|".join(f"(?:{old})" for old, _ in row.renames)), each


def rename(row: Row, name: str) -> str:
    """Return the module's name of a tensor; each pattern is applied at most once."""
    if not row.renames:
        return name
    any_of, each = _patterns(row)
    if any_of.search(name):
        for old, new in each:
            name = old.sub(new, name, count=1)
    return name


def _renamed(builds: list[Build], row: Row) -> Iterator[Build]:
    for build in builds:
        if not row.renames:
            yield build
            continue
        target, *others = (rename(row, name) for name in build.targets)
        yield replace(build, target=target, others=tuple(others))
