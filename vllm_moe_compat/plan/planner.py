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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vllm_moe_compat.checkpoint.config import whole_number
from vllm_moe_compat.checkpoint.experts import ExpertBlock
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.numbers.fp8 import E8M0
from vllm_moe_compat.errors import LayoutError
from vllm_moe_compat.families.row import Moe, Row
from vllm_moe_compat.plan.check_experts import check_experts, lies_transposed
from vllm_moe_compat.plan.check_numbers import check_fp8
from vllm_moe_compat.plan.findings import refuse
from vllm_moe_compat.plan.norms import norms
from vllm_moe_compat.plan.ops import (
    DequantizeFp8,
    Op,
    SplitGateUp,
    SplitLatent,
    SplitRows,
    StackExperts,
    Transpose,
)
from vllm_moe_compat.plan.specs import Operand, Spec
from vllm_moe_compat.plan.upstream import digests_block, digests_fp8, is_foreign

_LAYER = re.compile(r"^(.*?(?:layers|h)\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Build:
    """One tensor to make.

    Attributes:
        target: its name.
        weights: the weights that it is made of, in order.
        scales: their scales in the same order; none where nothing is quantised.
        ops: what to do with them; nothing where it only gets another name.
        others: further targets, where the operations give more than one weight.
    """

    target: str
    weights: tuple[str, ...]
    scales: tuple[str, ...]
    ops: tuple[Op, ...]
    others: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """All the tensors that come out, in the operations' order."""
        return (self.target, *self.others)

    @property
    def layer(self) -> str:
        """The layer that the target is in, or the target itself."""
        match = _LAYER.match(self.target)
        return match[1] if match else self.target

    def results(self, tensors: Mapping[str, TensorInfo], dtype: str) -> tuple[Spec, ...]:
        """Return what the targets will be, by the operations' own algebra.

        Args:
            tensors: the sources' descriptions.
            dtype: safetensors' name of what dequantising gives.
        """
        operand = Operand(_specs(self.weights, tensors), _specs(self.scales, tensors))
        for op in self.ops:
            operand = op.result(operand, dtype)
        return operand.weights


def _specs(names: tuple[str, ...], tensors: Mapping[str, TensorInfo]) -> tuple[Spec, ...]:
    """Describe the sources of one build; several are alike, or there were no plan."""
    return tuple(Spec(tensors[n].dtype, tensors[n].shape) for n in names[:1]) * len(names)


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
        dequantized: how many FP8 tensors of the checkpoint are dequantised.
        digested: how many upstream dequantises, in bfloat16.
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
    if is_foreign(row, layout):
        return Plan(row.module, layout.words, digested=len(layout.fp8.pairs))
    digested = digests_fp8(row, layout) and not split and not exact
    blocks = [b for b in layout.experts if b.per_expert or (b.combined and not b.packed)]
    take = row.moe is not None and any(
        (split and (b.per_expert or _is_fp8(b, layout)))
        or not digests_block(row.moe, b, layout)
        or (_is_fp8(b, layout) and not digested)
        for b in blocks
    )
    judged = check_experts(layout, row, config) if take or not direct else ()
    refuse([*check_fp8(layout), *judged], layout.tensors)
    digested = digested and not take
    pairs = {} if digested else dict(layout.fp8.pairs)

    builds: list[Build] = []
    experts = 0
    for block in blocks if take else ():
        assert row.moe is not None
        for build in _stack(row.moe, block, layout, config, pairs):
            builds.append(build)
            if len(build.weights) > 1:
                experts = len(build.weights)
            elif not experts:
                experts = layout.tensors[build.weights[0]].shape[0]
    done = {name for build in builds for name in build.weights}
    builds.extend(_others(layout, row, config, pairs, done))
    shifts, widen, early = norms(layout, row, stacking=take)
    builds.extend(Build(name, (name,), (), (op,)) for name, op in shifts)
    # Layer by layer; stable, so inside a layer the order stays.
    order = {layer: n for n, layer in enumerate(dict.fromkeys(b.layer for b in builds))}
    builds.sort(key=lambda build: order[build.layer])
    drops = row.ignored if early else row.drops
    return Plan(
        module=row.module,
        words=layout.words,
        builds=tuple(_renamed(builds, row)),
        drops=(
            *layout.fp8.static,
            *sorted(drops.of(config).select(layout.ignored)),
        ),
        widen=widen,
        experts=experts,
        stacked=len(blocks) if take else 0,
        dequantized=0 if digested else len(layout.fp8.pairs),
        digested=len(layout.fp8.pairs) if digested else 0,
    )


def _is_fp8(block: ExpertBlock, layout: Layout) -> bool:
    pairs = layout.fp8.pairs
    return any(
        name in pairs
        for names in (
            block.combined.values(),
            *(experts.values() for experts in block.per_expert.values()),
        )
        for name in names
    )


def _stack(
    moe: Moe,
    block: ExpertBlock,
    layout: Layout,
    config: Mapping[str, Any],
    pairs: dict[str, str],
) -> Iterator[Build]:
    """Build the stacked projections of one layer; takes its weights out of ``pairs``."""
    source = moe.source_of(block.path)
    assert source is not None, "check_experts has refused it"
    root = (block.path.removesuffix(source) if source else f"{block.path}.") + moe.target
    into = dict(moe.into)
    # A layer is built as one: what the parts share is worked out once.
    transposed = bool(block.combined) and lies_transposed(moe, block, layout, config)
    groups: list[tuple[str, tuple[str, ...], tuple[Op, ...]]] = [
        (part, tuple(names[e] for e in sorted(names)), (StackExperts(len(names)),))
        for part, names in block.per_expert.items()
    ] or [(part, (name,), ()) for part, name in block.combined.items()]
    order = ("gate_up", "gate", "up", "down")
    for part, weights, first in sorted(groups, key=lambda g: order.index(g[0].partition(".")[0])):
        name, _, bias = part.partition(".")
        kind = "bias" if bias else "weight"
        scales = tuple(pairs.pop(w) for w in weights if w in pairs)
        ops = first
        if scales:
            ops += (_dequantize(layout, weights[0], scales[0]),)
        if transposed and not bias:
            ops += (Transpose(),)
        if name == "gate_up":
            ops += (SplitGateUp(moe.interleaved, -1 if bias else -2),)
            gate, up = (f"{root}.{into[p]}.{kind}" for p in ("gate", "up"))
            yield Build(gate, weights, scales, ops, (up,))
        else:
            yield Build(f"{root}.{into[name]}.{kind}", weights, scales, ops)


def _dequantize(layout: Layout, weight: str, scale: str) -> DequantizeFp8:
    info = layout.tensors[scale]
    block = layout.block_of(layout.tensors[weight].shape, info.shape)
    assert block is not None, "check_fp8 has refused it"
    return DequantizeFp8(block, info.dtype in E8M0)


def _others(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    pairs: Mapping[str, str],
    done: set[str],
) -> Iterator[Build]:
    """Build what is dequantised, split or renamed and is no routed expert."""
    names = layout.tensors if row.renames or row.splits or row.latent else pairs
    scales_of = layout.fp8_scales
    for name in names:
        if name in done or name in scales_of:
            continue
        scales = (pairs[name],) if name in pairs else ()
        ops: tuple[Op, ...] = (_dequantize(layout, name, scales[0]),) if scales else ()
        targets: tuple[str, ...] = (name,)
        for end, parts in row.splits:
            if name.endswith(end):
                ops += (SplitRows(len(parts)),)
                targets = tuple(name.removesuffix(end) + part for part in parts)
        if row.latent and name.endswith(".kv_b_proj.weight"):
            ops += (_split_latent(layout, name, config),)
            module = name.removesuffix("kv_b_proj.weight")
            targets = (f"{module}embed_q.weight", f"{module}unembed_out.weight")
        if ops or rename(row, name) != name:
            yield Build(targets[0], (name,), scales, ops, targets[1:])


def _split_latent(layout: Layout, name: str, config: Mapping[str, Any]) -> SplitLatent:
    """Return what splits ``kv_b_proj``, if its rows are so many heads of keys and values."""
    heads = whole_number(config, "num_attention_heads") or 0
    keys = whole_number(config, "qk_nope_head_dim") or 0
    info = layout.tensors[name]
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
        yield Build(target, build.weights, build.scales, build.ops, tuple(others))
