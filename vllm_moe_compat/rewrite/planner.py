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
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.row import Moe, Row
from vllm_moe_compat.plan.norms import norms
from vllm_moe_compat.plan.ops import (
    Add,
    DequantizeFp8,
    Op,
    QuantizeFp8,
    SplitGateUp,
    StackExperts,
    Transpose,
    scale_grid,
)
from vllm_moe_compat.plan.planner import Build, Plan, make_plan
from vllm_moe_compat.plan.upstream import is_foreign
from vllm_moe_compat.rewrite.written_layout import STACKED, Form, Part, builds_of


@dataclass(frozen=True, slots=True)
class Write:
    """A build the other way round.

    Attributes:
        sources: the tensors that it is made of: a build's targets.
        ops: the inverse operations, the last one first.
        weights: what comes out: a build's sources.
        scales: their scales; none where nothing is quantised.
    """

    sources: tuple[str, ...]
    ops: tuple[Op, ...]
    weights: tuple[str, ...]
    scales: tuple[str, ...] = ()


def invert(build: Build) -> Write:
    """Return what undoes the build."""
    ops = tuple(op.inverse() for op in reversed(build.ops))
    return Write(build.targets, ops, build.weights, build.scales)


@dataclass(frozen=True, slots=True)
class Step:
    """What is done at once, and alone in memory.

    Attributes:
        there: builds that make the stacked form; none where it is there.
        back: what is made of it.
        moved: whether FP8 weights and scales go through together, none multiplied:
            every operation then means both.
    """

    there: tuple[Build, ...]
    back: tuple[Write, ...]
    moved: bool = False


@dataclass(frozen=True, slots=True)
class Rewriting:
    """How a checkpoint is written anew.

    Attributes:
        steps: in the order of the checkpoint's tensors.
        kept: tensors that stay as they are.
    """

    steps: tuple[Step, ...]
    kept: tuple[str, ...]


def plan_rewriting(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    form: Form,
    linear: Callable[[str], bool] = lambda name: False,
) -> Rewriting:
    """Plan how to bring a checkpoint into another form.

    Names become those that the row's module knows. What it ignores has no part in it,
    and neither have scales of activations.

    Args:
        layout: what the checkpoint holds.
        row: what is known about its module.
        config: the checkpoint's.
        form: the wanted one.
        linear: which weights ``[O, I]``, besides experts and those that are FP8 already,
            an FP8 form is to quantise.

    Raises:
        LayoutError: the tensors contradict each other or the config.
        SettingError: the row has nothing of the kind that the form names.
        UnsupportedCheckpointError: a form that is not read, or cannot be written.
    """
    if is_foreign(row, layout) or any(block.packed for block in layout.experts):
        raise UnsupportedCheckpointError(
            f"{row.module} keeps this checkpoint's {layout.words} packed, where floats or block "
            "FP8 were expected; start from a bf16 or FP8 release of the model."
        )
    moe = replace(row.moe, reads=()) if row.moe is not None else None
    there = make_plan(
        layout,
        replace(row, moe=moe, fp8=(), arithmetic=None),
        config,
        split=True,
        exact=True,
    )
    steps: list[Step] = []
    kept: list[str] = []
    of_experts: set[str] = set()
    for prefix, parts in _parts(row, layout, there).items():
        assert row.moe is not None
        wanted = list(builds_of(form, row.moe, prefix, parts))
        for group in _groups(parts):
            names = {part.name for part in group}
            builds = [build for build in there.builds if names & {*build.targets}]
            back = [build for build in wanted if names & {*build.targets}]
            of_experts |= names | {n for b in builds for n in (*b.weights, *b.scales)}
            if builds == back or (not builds and all(_nothing(build) for build in back)):
                kept += [name for b in back for name in (*b.weights, *b.scales)]
            else:
                steps += _steps(builds, back, layout)
    steps += _others(layout, row, there, form, linear, of_experts, kept)
    order = {name: number for number, name in enumerate(layout.tensors)}
    steps.sort(key=lambda step: order[_first(step)])
    return Rewriting(tuple(steps), tuple(sorted(kept, key=order.__getitem__)))


def _first(step: Step) -> str:
    return step.there[0].weights[0] if step.there else step.back[0].sources[0]


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
    into = {name: part for part, name in row.moe.into}
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


def _steps(builds: Sequence[Build], back: Sequence[Build], layout: Layout) -> Iterator[Step]:
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
        isinstance(op, StackExperts | DequantizeFp8) for op in build.ops
    )


def _one(build: Build, number: int, target: str) -> Build:
    """Return the part of a stacking build that is about one expert."""
    ops = tuple(op for op in build.ops if isinstance(op, DequantizeFp8))
    place = slice(number, number + 1)
    return Build(target, build.weights[place], build.scales[place], ops)


def _step(builds: Sequence[Build], back: Sequence[Build], layout: Layout) -> Step:
    if _agree(builds, back, layout):
        return Step(
            tuple(_without_fp8(b) for b in builds),
            tuple(invert(_without_fp8(b)) for b in back),
            moved=True,
        )
    return Step(tuple(builds), tuple(map(invert, back)))


def _without_fp8(build: Build) -> Build:
    ops = tuple(op for op in build.ops if not isinstance(op, DequantizeFp8))
    return replace(build, ops=ops)


def _agree(builds: Sequence[Build], back: Sequence[Build], layout: Layout) -> bool:
    """Whether both forms are FP8, scaled alike, so that nothing need be multiplied."""
    found = {_stacked_block(b, layout) for b in builds} | {_stacked_block(b, None) for b in back}
    if len(found) != 1 or None in found or not builds:
        return False
    rows = {
        spec.shape[-2] % fp8.block[0]
        for fp8 in found
        if fp8 is not None
        for build in builds
        for spec in build.results(layout.tensors, "F32")
    }
    splits = [op for b in (*builds, *back) for op in b.ops if isinstance(op, SplitGateUp)]
    ((height, _),) = (fp8.block for fp8 in found if fp8 is not None)
    return not splits or (rows == {0} and (height == 1 or not any(op.interleaved for op in splits)))


def _stacked_block(build: Build, layout: Layout | None) -> DequantizeFp8 | None:
    """Return how the build's stacked weights would be scaled if they stayed FP8."""
    fp8 = next((op for op in build.ops if isinstance(op, DequantizeFp8)), None)
    known = (StackExperts, DequantizeFp8, Transpose, SplitGateUp)
    if fp8 is None or not all(isinstance(op, known) for op in build.ops):
        return None
    if layout is not None:
        weight, scale = (layout.tensors[names[0]] for names in (build.weights, build.scales))
        if scale.shape != scale_grid(weight.shape, fp8.block):
            return None
    if any(isinstance(op, Transpose) for op in build.ops):
        return replace(fp8, block=(fp8.block[1], fp8.block[0]))
    return fp8


def _others(
    layout: Layout,
    row: Row,
    there: Plan,
    form: Form,
    linear: Callable[[str], bool],
    done: set[str],
    kept: list[str],
) -> Iterator[Step]:
    """Yield the steps of all that is no routed expert; what has none goes to ``kept``."""
    builds = [b for b in there.builds if not done & {*b.weights}]
    taken = done | {name for b in builds for name in b.weights} | layout.fp8_scales
    shifts = dict(_shifts(layout, row, form))
    builds += [
        Build(n, (n,), (), (shifts[n],) if n in shifts else ())
        for n in layout.tensors
        if n not in taken
    ]
    for build in builds:
        specs = build.results(layout.tensors, "F32")
        wanted = []
        for name, spec in zip(build.targets, specs, strict=True):
            quantised = len(spec.shape) == 2 and (bool(build.scales) or linear(name))
            scale, ops = form.fp8(spec.shape, name) if quantised else ((), ())
            wanted.append(Build(name, (name,), scale, ops))
        if wanted == [build]:
            kept += [*build.weights, *build.scales]
        elif _nothing(build):
            yield Step((), tuple(map(invert, wanted)))
        else:
            yield _step([build], wanted, layout)


def _shifts(layout: Layout, row: Row, form: Form) -> list[tuple[str, Op]]:
    """Return what happens to norms that are stored less 1 unless experts are stacked."""
    if row.arithmetic is None or row.arithmetic.mark != "per-expert" or not layout.experts:
        return []
    before, after = bool(layout.experts[0].stacked), form.layout == STACKED
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


def quantises(step: Step) -> bool:
    """Whether the step rounds to FP8, and so wants to start from exact products."""
    return any(isinstance(op, QuantizeFp8) for write in step.back for op in write.ops)
