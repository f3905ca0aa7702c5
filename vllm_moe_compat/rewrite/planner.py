"""Plan how a checkpoint is written in another layout.

A rewrite has two halves. The forward half is a load's plan, which gives stacked experts. The
backward half consists of the inverses of the builds that would load the wanted layout.

Needless work is left out: tensors that are already in the wanted layout are kept. Experts that
only change their name or their number form are rewritten one at a time. If both layouts store
numbers in the same form, weights and their parts are moved without being dequantised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from vllm_moe_compat.rewrite.steps import RewritePlan, RewriteStep, invert
from vllm_moe_compat.rewrite.written_layout import STACKED, Part, WrittenLayout, builds_of


def plan_rewrite(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    wanted: WrittenLayout,
    linear: Callable[[str], bool] = lambda name: False,
) -> RewritePlan:
    """Plan how to write a checkpoint in another layout.

    Tensors get the names that the row's module knows. Extra tensors and scales of activations
    are not written.

    Args:
        layout: the checkpoint's layout.
        row: its module's row.
        config: the checkpoint's config.
        wanted: the layout to write.
        linear: whether a float weight ``[O, I]`` that is not an expert is written in the wanted
            number form.

    Raises:
        LayoutError: the tensors contradict each other or the config.
        SettingError: the wanted layout names a path or a spelling that the row does not have.
        UnsupportedCheckpointError: a layout or number form cannot be read or written.
    """
    if keeps_numbers(row, layout) or any(block.packed for block in layout.experts):
        raise UnsupportedCheckpointError(
            f"{row.module} keeps this checkpoint's {layout.words} packed, where floats or block "
            "FP8 were expected; start from a bf16 or FP8 release of the model."
        )
    moe = replace(row.moe, stacks=()) if row.moe is not None else None
    forward = make_plan(
        layout,
        replace(row, moe=moe, digests=(), norm_shift=None),
        config,
        split=True,
        exact=True,
    )
    steps: list[RewriteStep] = []
    kept: list[str] = []
    of_experts: set[str] = set()
    for prefix, parts in _parts(row, layout, forward).items():
        assert row.moe is not None
        inverses = list(builds_of(wanted, row.moe, prefix, parts))
        for group in _groups(parts):
            names = {part.name for part in group}
            builds = [build for build in forward.builds if names & {*build.targets}]
            wanted_builds = [build for build in inverses if names & {*build.targets}]
            of_experts |= names | {name for build in builds for name in build.sources}
            unchanged = not builds and all(_is_unchanged(build) for build in wanted_builds)
            if builds == wanted_builds or unchanged:
                kept += [name for build in wanted_builds for name in build.sources]
            else:
                steps += _steps(builds, wanted_builds, layout)
    steps += _other_steps(layout, row, forward, wanted, linear, of_experts, kept)
    order = {name: number for number, name in enumerate(layout.tensors)}
    steps.sort(key=lambda step: order[_first(step)])
    return RewritePlan(tuple(steps), tuple(sorted(kept, key=order.__getitem__)))


def _first(step: RewriteStep) -> str:
    return step.builds[0].weights[0] if step.builds else step.writes[0].sources[0]


def _is_unchanged(build: Build) -> bool:
    return not build.ops and build.weights == build.targets


def _parts(row: Row, layout: Layout, forward: Plan) -> dict[str, dict[tuple[str, str], Part]]:
    """Return the stacked tensors after ``forward``: layer prefix → part and kind → tensor."""
    if row.moe is None:
        return {}
    names = {name for block in layout.experts for name in block.names()}
    sources = {layout.numbers.stored(name).tensor for name in names}
    shapes = {
        target: spec.shape
        for build in forward.builds
        if build.weights[0] in sources
        for target, spec in zip(build.targets, build.results(layout.tensors, "F32"), strict=True)
    }
    made = {name for build in forward.builds for name in build.weights}
    shapes |= {name: layout.tensors[name].shape for name in sources - made}
    into = {name: part for part, name in row.moe.projections}
    homes = "|".join(map(re.escape, _homes(row.moe)))
    pattern = re.compile(rf"(|.*\.)(?:{homes})\.({'|'.join(into)})\.(weight|bias)")
    found: dict[str, dict[tuple[str, str], Part]] = {}
    for name in sorted(shapes):
        match = pattern.fullmatch(name)
        if match is None:
            raise UnsupportedCheckpointError(
                f"{name} is not an expert weight that {row.module} knows, where names under "
                f"{row.moe.target} were expected; start from the model's own release."
            )
        found.setdefault(match[1], {})[into[match[2]], match[3]] = Part(name, shapes[name])
    ranks = list(into.values())
    return {
        prefix: dict(sorted(parts.items(), key=lambda item: ranks.index(item[0][0])))
        for prefix, parts in found.items()
    }


def _homes(moe: Moe) -> list[str]:
    """Return the paths of stacked experts, the longest first, as one may be the end of another."""
    return sorted({moe.target, *moe.sources}, key=len, reverse=True)


def _groups(parts: Mapping[tuple[str, str], Part]) -> Iterator[list[Part]]:
    """Yield the tensors that one build may make together: gate and up; down; their biases."""
    for roles in (("gate", "up"), ("down",)):
        for kind in ("weight", "bias"):
            if found := [parts[role, kind] for role in roles if (role, kind) in parts]:
                yield found


def _steps(
    builds: Sequence[Build], wanted: Sequence[Build], layout: Layout
) -> Iterator[RewriteStep]:
    """Yield the steps from one layer's ``builds`` to the sources of ``wanted``."""
    pairs = [(b, w) for b in builds for w in wanted if b.targets == w.targets]
    per_expert = all(map(_is_per_expert, (*builds, *wanted)))
    if len(pairs) == len(builds) == len(wanted) and per_expert:
        for build, inverse in pairs:
            for number, name in enumerate(inverse.weights):
                first = _of_expert(build, number, name)
                yield _step([first], [_of_expert(inverse, number, name)], layout)
        return
    yield _step(builds, wanted, layout)


def _is_per_expert(build: Build) -> bool:
    """Whether the build only stacks and dequantises per-expert weights."""
    return any(isinstance(op, StackExperts) for op in build.ops) and all(
        isinstance(op, StackExperts | Dequantize) for op in build.ops
    )


def _of_expert(build: Build, number: int, target: str) -> Build:
    """Return the build of one expert from a build that stacks per-expert weights."""
    ops = tuple(op for op in build.ops if isinstance(op, Dequantize))
    place = slice(number, number + 1)
    parts = tuple((role, names[place]) for role, names in build.parts)
    return Build(target, build.weights[place], parts, ops)


def _step(builds: Sequence[Build], wanted: Sequence[Build], layout: Layout) -> RewriteStep:
    if _same_form(builds, wanted, layout):
        return RewriteStep(
            tuple(_still_stored(b) for b in builds),
            tuple(invert(_still_stored(b)) for b in wanted),
            stays_stored=True,
        )
    return RewriteStep(tuple(builds), tuple(map(invert, wanted)))


def _still_stored(build: Build) -> Build:
    """Return the build without its dequantising operation."""
    ops = tuple(op for op in build.ops if not isinstance(op, Dequantize))
    return replace(build, ops=ops)


def _same_form(builds: Sequence[Build], wanted: Sequence[Build], layout: Layout) -> bool:
    """Whether both layouts store numbers in the same form, so that none is dequantised."""
    found = {_stacked_form(b, layout) for b in builds} | {_stacked_form(b, None) for b in wanted}
    (form, *others) = found
    if others or form is None or not builds:
        return False
    height = form.rows_per_part
    splits = [op for b in (*builds, *wanted) for op in b.ops if isinstance(op, SplitGateUp)]
    whole = all(
        spec.shape[-2] % height == 0
        for build in builds
        for spec in build.results(layout.tensors, "F32")
    )
    return not splits or (whole and (height == 1 or not any(op.interleaved for op in splits)))


def _stacked_form(build: Build, layout: Layout | None) -> Dequantize | None:
    """Return the operation that would dequantise the build's targets if they stayed stored.

    None if the targets cannot stay in a stored form.
    """
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


def _other_steps(
    layout: Layout,
    row: Row,
    forward: Plan,
    wanted_layout: WrittenLayout,
    linear: Callable[[str], bool],
    done: set[str],
    kept: list[str],
) -> Iterator[RewriteStep]:
    """Yield the steps of all other tensors; add unchanged tensors to ``kept``."""
    builds = [b for b in forward.builds if not done & {*b.weights}]
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
        elif _is_unchanged(build):
            yield RewriteStep((), tuple(map(invert, wanted)))
        else:
            yield _step([build], wanted, layout)


def _shifts(layout: Layout, row: Row, wanted: WrittenLayout) -> list[tuple[str, Op]]:
    """Return operations on norms that are stored minus 1 unless experts are stacked."""
    if row.norm_shift is None or row.norm_shift.mark != "per-expert" or not layout.experts:
        return []
    before, after = bool(layout.experts[0].stacked), wanted.experts == STACKED
    if before == after:
        return []
    found, _, _ = norms(layout, row, stacking=True)
    if after:
        return found
    convolutions: list[tuple[str, Op]] = [
        (name, Transpose())
        for name, info in layout.tensors.items()
        if name.endswith("conv1d.weight") and info.shape[-1:] == (1,)
    ]
    return [(name, op.inverse()) for name, op in found if isinstance(op, Add)] + convolutions
