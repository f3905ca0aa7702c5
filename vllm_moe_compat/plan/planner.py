"""From a layout and a registry row to the list of tensors that have to be made.

A ``Build`` names its target with the checkpoint's own prefix and leaves prefixes and
whatever else upstream's ``sanitize`` does right to it; so no prefix is ever applied
twice, and a tensor that upstream digests has no ``Build`` at all. The whole
checkpoint is checked before a plan is returned.

Experts are taken over for all layers or for none: several families look at the first
layer only to see whether experts are stacked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from vllm_moe_compat.plan.check_experts import check_experts, lies_transposed
from vllm_moe_compat.plan.norms import norms
from vllm_moe_compat.plan.ops import (
    SplitGateUp,
    SplitLatent,
    SplitRows,
    StackExperts,
    Transpose,
)
from vllm_moe_compat.plan.upstream import digests_block, digests_numbers, keeps_numbers


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that has to happen to a checkpoint's tensors.

    Attributes:
        module: the mlx-lm module that the plan is for.
        words: the layout in words.
        builds: the tensors to make, layer by layer.
        drops: tensors to take out because nobody reads them.
        widen: narrow tensors that ``sanitize`` computes with: float32 serving
            wants them widened before.
        experts: routed experts per layer, where they are stacked; else 0.
        stacked: how many layers have their experts stacked.
        dequantized: how many weights in a stored number form are dequantised.
        digested: how many of them upstream dequantises or keeps.
    """

    module: str
    words: str
    builds: tuple[Build, ...] = ()
    drops: tuple[str, ...] = ()
    widen: tuple[str, ...] = ()
    experts: int = 0
    stacked: int = 0
    dequantized: int = 0
    digested: int = 0

    @property
    def empty(self) -> bool:
        """Whether the checkpoint is left exactly as it is."""
        return not self.builds and not self.drops


def make_plan(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    *,
    split: bool = False,
    exact: bool = False,
    direct: bool = False,
) -> Plan:
    """Plan how the module of ``row`` gets its tensors from this checkpoint.

    Args:
        layout: what the checkpoint holds.
        row: what is known about the module.
        config: the checkpoint's.
        split: whether every expert is stacked here and not by upstream, which knows
            nothing of the scales that requantised ones have.
        exact: whether bfloat16, in which upstream multiplies, is too coarse for
            what will be served.
        direct: whether there is only a dict that someone gave to ``sanitize``: what
            upstream does by itself is then not judged before it.

    Raises:
        LayoutError: the tensors contradict each other or the config.
        UnsupportedCheckpointError: a form that is not served.
    """
    numbers = layout.numbers
    if keeps_numbers(row, layout):
        return Plan(row.module, layout.words, digested=len(numbers.weights))
    digested = digests_numbers(row, layout) and not split and not exact
    blocks = [b for b in layout.experts if b.per_expert or (b.combined and not b.packed)]
    take = row.moe is not None and any(
        (split and (b.per_expert or _is_stored(b, numbers)))
        or not digests_block(row.moe, b, layout)
        or (_is_stored(b, numbers) and not digested)
        for b in blocks
    )
    judged = check_experts(layout, row, config) if take or not direct else ()
    refuse([*numbers.findings(), *judged], layout.tensors)
    digested = digested and not take
    stored = set[str]() if digested else set(numbers.weights)

    builds: list[Build] = []
    experts = 0
    for block in blocks if take else ():
        assert row.moe is not None
        for build in _stack(row.moe, block, layout, config, stored):
            builds.append(build)
            if len(build.weights) > 1:
                experts = len(build.weights)
            elif not experts:
                experts = layout.tensors[build.weights[0]].shape[0]
    done = {name for build in builds for name in build.sources}
    builds.extend(_others(layout, row, config, stored, done))
    shifts, widen, early = norms(layout, row, stacking=take)
    builds.extend(Build(name, (name,), (), (op,)) for name, op in shifts)
    # Layer by layer; stable, so inside a layer the order stays.
    order = {layer: n for n, layer in enumerate(dict.fromkeys(b.layer for b in builds))}
    builds.sort(key=lambda build: order[build.layer])
    drops = row.ignored if early else row.dropped_here
    return Plan(
        module=row.module,
        words=layout.words,
        builds=tuple(_renamed(builds, row)),
        drops=(
            *numbers.unused,
            *sorted(drops.of(config).select(layout.ignored)),
        ),
        widen=widen,
        experts=experts,
        stacked=len(blocks) if take else 0,
        dequantized=0 if digested else len(numbers.weights),
        digested=len(numbers.weights) if digested else 0,
    )


def _is_stored(block: ExpertBlock, numbers: Numbers) -> bool:
    """Whether some of a layer's experts are in a stored number form."""
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
    """Make a build of weights that are alike, dequantised between ``before`` and ``after``."""
    if not stored:
        return Build(targets[0], tuple(weights), (), (*before, *after), tuple(targets[1:]))
    dequantize = numbers.dequantize(weights[0])
    assert dequantize is not None, "it is in a stored number form"
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
    """Build the stacked projections of one layer; takes its weights out of ``stored``."""
    source = moe.source_of(block.path)
    assert source is not None, "check_experts has refused it"
    root = (block.path.removesuffix(source) if source else f"{block.path}.") + moe.target
    into = dict(moe.projections)
    # Gate, up and down of a layer lie alike.
    transposed = bool(block.combined) and lies_transposed(moe, block, layout, config)
    groups: list[tuple[str, tuple[str, ...], tuple[Op, ...]]] = [
        (part, tuple(names[e] for e in sorted(names)), (StackExperts(len(names)),))
        for part, names in block.per_expert.items()
    ] or [(part, (name,), ()) for part, name in block.combined.items()]
    order = ("gate_up", "gate", "up", "down")
    for part, weights, before in sorted(groups, key=lambda g: order.index(g[0].partition(".")[0])):
        name, _, bias = part.partition(".")
        kind = "bias" if bias else "weight"
        after: tuple[Op, ...] = (Transpose(),) if transposed and not bias else ()
        targets = [f"{root}.{into[name]}.{kind}"] if name != "gate_up" else []
        if name == "gate_up":
            after += (SplitGateUp(moe.interleaved, -1 if bias else -2),)
            targets = [f"{root}.{into[p]}.{kind}" for p in ("gate", "up")]
        here = weights[0] in stored
        stored.difference_update(weights)
        yield _build(layout.numbers, targets, weights, before, after, stored=here)


def _others(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    stored: set[str],
    done: set[str],
) -> Iterator[Build]:
    """Build the weights that are dequantised, split or renamed and are no routed experts."""
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
    """Return what splits ``kv_b_proj``, if its rows are so many heads of keys and values."""
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
    """Return what the module of ``row`` calls the tensor; every pattern counts once."""
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
