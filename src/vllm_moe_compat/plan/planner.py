"""From a layout and a registry row to the list of tensors that have to be made.

A ``Build`` names its target with the checkpoint's own prefix and leaves prefixes,
norm shifts and the splitting of combined bf16 experts to upstream's ``sanitize``;
so no prefix is ever applied twice, and a tensor that upstream digests has no
``Build`` at all. The whole checkpoint is checked before a plan is returned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.layout import ExpertBlock, Layout, TensorInfo
from vllm_moe_compat.plan.check_experts import check_experts
from vllm_moe_compat.plan.check_fp8 import DEFAULT_BLOCK, check_fp8
from vllm_moe_compat.plan.findings import refuse
from vllm_moe_compat.plan.ops import (
    DequantizeBlockFp8,
    Op,
    Operand,
    Spec,
    SplitGateUp,
    StackExperts,
)
from vllm_moe_compat.plan.row import Moe, Row

_LAYER = re.compile(r"^(.*?layers\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Build:
    """One tensor to make.

    Attributes:
        target: its name.
        weights: the weights that it is made of, in order.
        scales: their scales in the same order; none where nothing is quantised.
        ops: what to do with them.
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
    """

    module: str
    words: str
    builds: tuple[Build, ...] = ()
    drops: tuple[str, ...] = ()
    widen: tuple[str, ...] = ()
    experts: int = 0
    stacked: int = 0
    dequantized: int = 0

    @property
    def empty(self) -> bool:
        """Whether the checkpoint is left exactly as it is."""
        return not self.builds and not self.drops


def make_plan(layout: Layout, row: Row, config: Mapping[str, Any], *, split: bool = False) -> Plan:
    """Plan how the module of ``row`` gets its tensors from this checkpoint.

    Args:
        layout: what the checkpoint holds.
        row: what is known about the module.
        config: the checkpoint's.
        split: whether combined FP8 experts are split here and not by upstream,
            which knows nothing of the scales that requantised ones have.

    Raises:
        LayoutError: the tensors contradict each other or the config.
        UnsupportedCheckpointError: a form that is not served.
    """
    refuse([*check_fp8(layout), *check_experts(layout, row, config)], layout.tensors)

    pairs = dict(layout.fp8.pairs)
    dequantize = (DequantizeBlockFp8(layout.block or DEFAULT_BLOCK),)
    builds: list[Build] = []
    stacked = 0
    experts = 0
    for block in layout.experts:
        if split and row.moe is not None and block.combined:
            builds.extend(_split_combined(row.moe, block, pairs, dequantize))
        if row.moe is None or not block.per_expert:
            continue
        stacked += 1
        root = block.parent.removesuffix(row.moe.source.rpartition(".")[0])
        for source, target in row.moe.projections:
            weights = tuple(block.per_expert[source][e] for e in sorted(block.per_expert[source]))
            experts = len(weights)
            scales = tuple(pairs.pop(name) for name in weights if name in pairs)
            builds.append(
                Build(
                    f"{root}{row.moe.target}.{target}.weight",
                    weights,
                    scales,
                    (StackExperts(experts), *(dequantize if scales else ())),
                )
            )
    builds.extend(Build(name, (name,), (scale,), dequantize) for name, scale in pairs.items())
    # Stable: inside a layer the order stays.
    order = {layer: n for n, layer in enumerate(dict.fromkeys(b.layer for b in builds))}
    builds.sort(key=lambda build: order[build.layer])
    return Plan(
        module=row.module,
        words=layout.words,
        builds=tuple(builds),
        drops=(*layout.fp8.static, *sorted(row.drops.select(layout.ignored))),
        widen=_widen(layout, row),
        experts=experts,
        stacked=stacked,
        dequantized=len(layout.fp8.pairs),
    )


def _split_combined(
    moe: Moe, block: ExpertBlock, pairs: dict[str, str], dequantize: tuple[Op, ...]
) -> Iterator[Build]:
    """Build gate, up and down from combined FP8 experts; takes them out of ``pairs``."""
    root = block.parent.removesuffix(moe.source.rpartition(".")[0]) + moe.target
    gate, up, down = (f"{root}.{target}.weight" for _, target in moe.projections)
    fused, single = block.combined.get("gate_up_proj", ""), block.combined.get("down_proj", "")
    if fused in pairs:
        ops = (*dequantize, SplitGateUp())
        yield Build(gate, (fused,), (pairs.pop(fused),), ops, (up,))
        # Upstream renames the other half only together with the one that is gone.
        scales = (pairs.pop(single),) if single in pairs else ()
        yield Build(down, (single,), scales, dequantize if scales else ())


def _widen(layout: Layout, row: Row) -> tuple[str, ...]:
    """Return the half-precision tensors that this checkpoint's ``sanitize`` will compute with."""
    rule = row.arithmetic
    if rule is None:
        return ()
    marked = [info for name, info in layout.tensors.items() if name.endswith(rule.marker)]
    if all(info.shape[-1:] == (1,) for info in marked):
        return ()
    return tuple(
        name
        for name, info in layout.tensors.items()
        if name.endswith(rule.suffixes) and info.dtype in ("BF16", "F16")
    )
