"""From the layout that a checkpoint has to the one that it is to have, step by step.

There by the plan, to MLX's stacked form; back by the inverses of the builds with which
the wanted form would be loaded. Nothing is computed that need not be: tensors that are
in the wanted form already are kept, experts that only change their names or their FP8
block go one at a time, and where the blocks agree FP8 moves as it is, with its scales.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.numbers.form import WrittenWeights
from vllm_moe_compat.checkpoint.operations import Dequantize, Op, Spec
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.row import Moe, Row
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.norms import norms
from vllm_moe_compat.plan.ops import Add, SplitGateUp, StackExperts, Transpose
from vllm_moe_compat.plan.planner import Plan, make_plan
from vllm_moe_compat.plan.upstream import keeps_numbers
from vllm_moe_compat.rewrite.written_layout import STACKED, Part, WrittenLayout, builds_of


@dataclass(frozen=True, slots=True)
class Write:
    """A build the other way round.

    Attributes:
        sources: the tensors that it is made of: a build's targets.
        ops: the inverse operations, the last one first.
        weights: the tensors that come out: a build's sources.
        parts: role → their further tensors; empty where floats are written.
    """

    sources: tuple[str, ...]
    ops: tuple[Op, ...]
    weights: tuple[str, ...]
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that come out."""
        return (*self.weights, *(name for _, names in self.parts for name in names))


def invert(build: Build) -> Write:
    """Return what undoes the build."""
    ops = tuple(op.inverse() for op in reversed(build.ops))
    return Write(build.targets, ops, build.weights, build.parts)


@dataclass(frozen=True, slots=True)
class RewriteStep:
    """One step of a rewrite; only its tensors are in memory meanwhile.

    Attributes:
        builds: make the stacked tensors; none where the checkpoint has them.
        writes: make the wanted tensors of those.
        stays_stored: whether weights move in their stored number form, together with their
            parts and without being dequantised: every operation then applies to both.
    """

    builds: tuple[Build, ...]
    writes: tuple[Write, ...]
    stays_stored: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether the step rounds to a stored form, and so has to start from exact products."""
        return any(
            isinstance(op.inverse(), Dequantize) for write in self.writes for op in write.ops
        )


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """How a checkpoint is written in another layout.

    Attributes:
        steps: in the order of the checkpoint's tensors.
        kept: tensors that stay as they are.
    """

    steps: tuple[RewriteStep, ...]
    kept: tuple[str, ...]


def plan_rewrite(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    wanted: WrittenLayout,
    linear: Callable[[str], bool] = lambda name: False,
) -> RewritePlan:
    """Plan how to write a checkpoint in another layout.

    Names become those that the row's module knows. What it ignores has no part in it,
    and neither have scales of activations.

    Args:
        layout: what the checkpoint holds.
        row: what is known about its module.
        config: the checkpoint's.
        wanted: the layout to write.
        linear: whether a weight ``[O, I]`` that is no expert and is stored as floats is to
            be written in the wanted number form.

    Raises:
        LayoutError: the tensors contradict each other or the config.
        SettingError: the row has nothing of the kind that the form names.
        UnsupportedCheckpointError: a form that is not read, or cannot be written.
    """
    if keeps_numbers(row, layout) or any(block.packed for block in layout.experts):
        raise UnsupportedCheckpointError(
            f"{row.module} keeps this checkpoint's {layout.words} packed, where floats or block "
            "FP8 were expected; start from a bf16 or FP8 release of the model."
        )
    moe = replace(row.moe, stacks=()) if row.moe is not None else None
    there = make_plan(
        layout,
        replace(row, moe=moe, digests=(), norm_shift=None),
        config,
        split=True,
        exact=True,
    )
    steps: list[RewriteStep] = []
    kept: list[str] = []
    of_experts: set[str] = set()
    for prefix, parts in _parts(row, layout, there).items():
        assert row.moe is not None
        inverses = list(builds_of(wanted, row.moe, prefix, parts))
        for group in _groups(parts):
            names = {part.name for part in group}
            builds = [build for build in there.builds if names & {*build.targets}]
            back = [build for build in inverses if names & {*build.targets}]
            of_experts |= names | {name for build in builds for name in build.sources}
            if builds == back or (not builds and all(_nothing(build) for build in back)):
                kept += [name for build in back for name in build.sources]
            else:
                steps += _steps(builds, back, layout)
    steps += _others(layout, row, there, wanted, linear, of_experts, kept)
    order = {name: number for number, name in enumerate(layout.tensors)}
    steps.sort(key=lambda step: order[_first(step)])
    return RewritePlan(tuple(steps), tuple(sorted(kept, key=order.__getitem__)))


def _first(step: RewriteStep) -> str:
    return step.builds[0].weights[0] if step.builds else step.writes[0].sources[0]


def _nothing(build: Build) -> bool:
    return not build.ops and build.weights == build.targets


def _parts(row: Row, layout: Layout, there: Plan) -> dict[str, dict[tuple[str, str], Part]]:
    """Return, by prefix of the layer, the experts' stacked tensors as ``there`` leaves them."""
    if row.moe is None:
        return {}
    sources = {name for block in layout.experts for name in block.names()}
    shapes = {
        target: spec.shape
        for build in there.builds
        if build.weights[0] in sources
        for target, spec in zip(build.targets, build.results(layout.tensors, "F32"), strict=True)
    }
    made = {name for build in there.builds for name in build.weights}
    shapes |= {name: layout.tensors[name].shape for name in sources - made}
    into = {name: part for part, name in row.moe.projections}
    homes = "|".join(map(re.escape, _homes(row.moe)))
    pattern = re.compile(rf"(|.*\.)(?:{homes})\.({'|'.join(into)})\.(weight|bias)")
    found: dict[str, dict[tuple[str, str], Part]] = {}
    for name in sorted(shapes):
        match = pattern.fullmatch(name)
        if match is None:
            raise UnsupportedCheckpointError(
                f"{name} is no expert weight that {row.module} knows, where {row.moe.target} was "
                "expected to hold them; start from the model's own release."
            )
        found.setdefault(match[1], {})[into[match[2]], match[3]] = Part(name, shapes[name])
    ranks = list(into.values())
    return {
        prefix: dict(sorted(parts.items(), key=lambda item: ranks.index(item[0][0])))
        for prefix, parts in found.items()
    }


def _homes(moe: Moe) -> list[str]:
    """Return where stacked experts may be, the longest first: one may end like another."""
    return sorted({moe.target, *moe.sources}, key=len, reverse=True)


def _groups(parts: Mapping[tuple[str, str], Part]) -> Iterator[list[Part]]:
    """Yield what may have to be made together: gate and up; down; their biases."""
    for roles in (("gate", "up"), ("down",)):
        for kind in ("weight", "bias"):
            if found := [parts[role, kind] for role in roles if (role, kind) in parts]:
                yield found


def _steps(builds: Sequence[Build], back: Sequence[Build], layout: Layout) -> Iterator[RewriteStep]:
    """Yield the steps from one layer's ``builds`` to the sources of ``back``."""
    pairs = [(b, w) for b in builds for w in back if b.targets == w.targets]
    if len(pairs) == len(builds) == len(back) and all(map(_alone, (*builds, *back))):
        for build, want in pairs:
            for number, name in enumerate(want.weights):
                first = _one(build, number, name)
                yield _step([first], [_one(want, number, name)], layout)
        return
    yield _step(builds, back, layout)


def _alone(build: Build) -> bool:
    """Whether the build only stacks and dequantises experts that are tensors of their own."""
    return any(isinstance(op, StackExperts) for op in build.ops) and all(
        isinstance(op, StackExperts | Dequantize) for op in build.ops
    )


def _one(build: Build, number: int, target: str) -> Build:
    """Return the part of a stacking build that is about one expert."""
    ops = tuple(op for op in build.ops if isinstance(op, Dequantize))
    place = slice(number, number + 1)
    parts = tuple((role, names[place]) for role, names in build.parts)
    return Build(target, build.weights[place], parts, ops)


def _step(builds: Sequence[Build], back: Sequence[Build], layout: Layout) -> RewriteStep:
    if _agree(builds, back, layout):
        return RewriteStep(
            tuple(_still_stored(b) for b in builds),
            tuple(invert(_still_stored(b)) for b in back),
            stays_stored=True,
        )
    return RewriteStep(tuple(builds), tuple(map(invert, back)))


def _still_stored(build: Build) -> Build:
    """Return the build without dequantising."""
    ops = tuple(op for op in build.ops if not isinstance(op, Dequantize))
    return replace(build, ops=ops)


def _agree(builds: Sequence[Build], back: Sequence[Build], layout: Layout) -> bool:
    """Whether both layouts store their numbers alike, so that none has to be dequantised."""
    found = {_stacked_form(b, layout) for b in builds} | {_stacked_form(b, None) for b in back}
    (form, *others) = found
    if others or form is None or not builds:
        return False
    height = form.rows_per_part
    splits = [op for b in (*builds, *back) for op in b.ops if isinstance(op, SplitGateUp)]
    whole = all(
        spec.shape[-2] % height == 0
        for build in builds
        for spec in build.results(layout.tensors, "F32")
    )
    return not splits or (whole and (height == 1 or not any(op.interleaved for op in splits)))


def _stacked_form(build: Build, layout: Layout | None) -> Dequantize | None:
    """Return how the build's stacked weights would be dequantised if they stayed stored."""
    op = next((op for op in build.ops if isinstance(op, Dequantize)), None)
    known = (StackExperts, Dequantize, Transpose, SplitGateUp)
    if op is None or not all(isinstance(op, known) for op in build.ops):
        return None
    if layout is not None:
        weight = _spec(layout, build.weights[0])
        parts = {role: _spec(layout, names[0]) for role, names in build.parts}
        if not op.parts_follow(weight, parts):
            return None
    return op.transposed() if any(isinstance(op, Transpose) for op in build.ops) else op


def _spec(layout: Layout, name: str) -> Spec:
    return Spec(layout.tensors[name].dtype, layout.tensors[name].shape)


def _others(
    layout: Layout,
    row: Row,
    there: Plan,
    wanted_layout: WrittenLayout,
    linear: Callable[[str], bool],
    done: set[str],
    kept: list[str],
) -> Iterator[RewriteStep]:
    """Yield the steps of all but routed experts; tensors that have none go to ``kept``."""
    builds = [b for b in there.builds if not done & {*b.weights}]
    taken = done | {name for b in builds for name in b.weights} | layout.numbers.parts
    shifts = dict(_shifts(layout, row, wanted_layout))
    builds += [
        Build(n, (n,), (), (shifts[n],) if n in shifts else ())
        for n in layout.tensors
        if n not in taken
    ]
    for build in builds:
        specs = build.results(layout.tensors, "F32")
        wanted = []
        for name, spec in zip(build.targets, specs, strict=True):
            quantised = len(spec.shape) == 2 and (bool(build.parts) or linear(name))
            stored = wanted_layout.stored(spec.shape, name) if quantised else WrittenWeights()
            wanted.append(Build(name, (name,), stored.parts, stored.ops))
        if wanted == [build]:
            kept += build.sources
        elif _nothing(build):
            yield RewriteStep((), tuple(map(invert, wanted)))
        else:
            yield _step([build], wanted, layout)


def _shifts(layout: Layout, row: Row, wanted: WrittenLayout) -> list[tuple[str, Op]]:
    """Return what happens to norms that are stored less 1 unless experts are stacked."""
    if row.norm_shift is None or row.norm_shift.mark != "per-expert" or not layout.experts:
        return []
    before, after = bool(layout.experts[0].stacked), wanted.experts == STACKED
    if before == after:
        return []
    found, _, _ = norms(layout, row, stacking=True)
    if after:
        return found
    turned: list[tuple[str, Op]] = [
        (name, Transpose())
        for name, info in layout.tensors.items()
        if name.endswith("conv1d.weight") and info.shape[-1:] == (1,)
    ]
    return [(name, op.inverse()) for name, op in found if isinstance(op, Add)] + turned
