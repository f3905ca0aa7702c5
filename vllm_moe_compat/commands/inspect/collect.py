"""Make an ``Inspection`` of a path: plan the load without running it.

The order is that of a load: config, headers, index, module, layout, plan, memory. Every
fault becomes a finding, and the remaining parts are still described.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat import __version__
from vllm_moe_compat.checkpoint.config import expert_count
from vllm_moe_compat.checkpoint.layout import Layout, detect
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.commands.inspect import describe
from vllm_moe_compat.commands.inspect.locate import locate
from vllm_moe_compat.commands.inspect.model import (
    Architecture,
    Extra,
    Inspection,
    Memory,
    Ours,
    Problem,
    Stock,
)
from vllm_moe_compat.commands.inspect.needs import memory
from vllm_moe_compat.commands.inspect.problems import FILES, clean, of_error, of_plan, problem
from vllm_moe_compat.commands.inspect.read import Given, read
from vllm_moe_compat.commands.inspect.steps import steps
from vllm_moe_compat.commands.inspect.stock import REFUSES, UNKNOWN, stock
from vllm_moe_compat.errors import CompatError, LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.families import modules, registry
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load import context as loads
from vllm_moe_compat.plan.check_experts import check_experts
from vllm_moe_compat.plan.check_numbers import check_fp8
from vllm_moe_compat.plan.planner import Plan, make_plan
from vllm_moe_compat.plan.upstream import is_foreign

SHOWN = 8
"""Maximum number of findings of one kind that are listed; duplicates are merged."""


@dataclass(slots=True)
class _Judged:
    """The parts of the result that depend on the planned load."""

    module: str | None = None
    row: Row | None = None
    stock: Stock | None = None
    ours: Ours | None = None
    memory: Memory | None = None


def inspect(name: str) -> Inspection:
    """Inspect a folder, a shard or a repository in the hub's cache.

    Raises:
        SettingError: there is no such checkpoint, or an environment variable is not valid.
    """
    given = read(locate(name))
    config = given.config or {}
    judged, layout = _Judged(), None
    if given.config is not None and given.tensors and given.place.shard is None:
        layout = _judge(given, judged)
    layout = layout or _detect(given, config)
    extras = _extras(given, layout) if layout is not None else []
    for extra in extras:
        if extra.agree is False:
            has = f"tensors of {extra.kind} are there ({extra.tensors:,})"
            says = "config.json speaks of them"
            given.add(
                f"{extra.kind}-disagree",
                f"{says}, and none are there" if extra.in_config else f"{has}, and no {says}",
                "nothing has to be done: text is served without them",
            )
    kinds = config.get("architectures")
    kinds = kinds if isinstance(kinds, list) else [kinds] if kinds else []
    kind = config.get("model_type")
    findings = _sorted(given.problems)
    ours = judged.ours or Ours(REFUSES if _errors(findings) else UNKNOWN, [])
    if _errors(findings):
        ours = Ours(REFUSES, ours.steps, ours.workarounds)
    return Inspection(
        path=clean(given.place.folder if given.place.shard is None else given.place.shard, 1000),
        repository=given.place.repository,
        tool=f"vllm-moe-compat {__version__}",
        verdict=ours.verdict,
        exit_code=_code(findings),
        findings=findings,
        files=describe.files(given.tensors, given.shards),
        architecture=Architecture(
            clean(kind, 100) if kind is not None else None,
            [clean(k, 100) for k in kinds[:8]],
            judged.module,
            judged.row is not None,
            modules.mlx_lm().version,
        ),
        experts=describe.experts(layout) if layout is not None else None,
        quantization=(
            describe.quantization(layout, config, given.extern)
            if layout is not None and given.tensors
            else None
        ),
        extras=extras,
        stock=judged.stock,
        ours=ours,
        memory=judged.memory,
    )


def _extras(given: Given, layout: Layout) -> list[Extra]:
    try:
        return describe.extras(layout, given.tensors, given.config)
    except LayoutError as error:
        given.problems.append(of_error("config-number", error))
        return describe.extras(layout, given.tensors, {})


def _errors(findings: list[Problem]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def _code(findings: list[Problem]) -> int:
    if any(finding.id in FILES for finding in findings):
        return 2
    return 1 if _errors(findings) else 0


def _sorted(findings: list[Problem]) -> list[Problem]:
    """Return the findings, errors first, at most ``SHOWN`` of a kind."""
    kinds: dict[str, list[Problem]] = {}
    for finding in dict.fromkeys(findings):
        kinds.setdefault(finding.id, []).append(finding)
    listed = []
    for id, alike in kinds.items():
        listed += alike[:SHOWN]
        if (rest := len(alike) - SHOWN) > 0:
            listed.append(problem(id, f"and {rest:,} more of this kind", alike[0].remedy))
    order = ("error", "warning", "note")
    return sorted(listed, key=lambda finding: order.index(finding.severity))


def _detect(given: Given, config: Mapping[str, Any]) -> Layout | None:
    try:
        return detect(given.tensors, config)
    except LayoutError as error:
        given.problems.append(of_error("config-number", error))
        return None


def _judge(given: Given, judged: _Judged) -> Layout | None:
    """Find module and row, make the plan, and return the layout, if it came to that."""
    assert given.config is not None
    original = given.config
    config = copy.deepcopy(original)
    if not isinstance(config.get("model_type"), str):
        given.add(
            "model-type",
            f"config.json: model_type is {config.get('model_type')!r}, where a name was expected",
            "download the config again",
        )
        return None
    told = modules.row_to_fix(config)
    try:
        changed = registry.fix_config(told, config) if told is not None else []
    except UnsupportedCheckpointError as error:
        given.problems.append(of_error("config-unsupported", error))
        return None
    if config.get("model_file") is not None:
        given.add(
            "own-code",
            f"config.json asks for {config['model_file']!r}, code that the checkpoint brings",
            "read it before you allow it with trust_remote_code",
        )
        return None
    judged.module, judged.row = modules.find(config)
    known = modules.mlx_lm().folder is None or modules.find(original)[0] is not None
    if judged.module is None:
        given.add(
            "module-unknown",
            f"mlx-lm {modules.mlx_lm().version or ''} has no module for model_type "
            f"{original['model_type']!r}",
            "see whether a newer mlx-lm has one",
        )
        judged.stock = Stock(REFUSES, ["it has no module for this model_type"])
    elif judged.row is None:
        return _judge_unmapped(given, judged)
    else:
        return _judge_mapped(given, judged, judged.row, config, changed, known=known)
    return None


def _judge_unmapped(given: Given, judged: _Judged) -> Layout | None:
    """Say of a module without a row what the load says of it."""
    assert given.config is not None
    if (layout := _detect(given, given.config)) is None:
        return None
    judged.stock = Stock(UNKNOWN, [f"the registry has no row for {judged.module}"])
    if weights := [*layout.fp8.pairs, *layout.fp8.bare]:
        given.add(
            "fp8-unmapped",
            f"{fold(weights)} are FP8, which {judged.module} takes for integers, and there is no "
            "row for it",
            "load a bf16 release of the model instead",
        )
        return layout
    if layout.per_expert:
        given.add(
            "experts-unmapped",
            f"{len(layout.per_expert):,} per-expert weights are left to {judged.module} as they "
            "are, since there is no row for it",
            "see whether mlx-lm stacks them itself, or ask for a row",
        )
    given.add("module-unmapped", f"{judged.module} has no row: mlx-lm loads it by itself")
    judged.ours = Ours(UNKNOWN, [])
    plan = Plan(judged.module or "", layout.words)
    _weigh(given, judged, [plan], layout, given.config)
    return layout


def _judge_mapped(
    given: Given,
    judged: _Judged,
    row: Row,
    config: dict[str, Any],
    changed: list[str],
    *,
    known: bool,
) -> Layout:
    assert given.config is not None
    try:
        layout = detect(given.tensors, config, row.ignored)
        faults = []
        if not is_foreign(row, layout):
            faults += of_plan("fp8", check_fp8(layout), given.tensors)
            faults += of_plan("experts", check_experts(layout, row, config), given.tensors)
        given.problems += faults
        if faults:
            judged.ours = Ours(REFUSES, [])
            return layout
        plans = [make_plan(layout, row, config)]
    except LayoutError as error:
        given.problems.append(of_error("config-number", error))
        return detect(given.tensors, {})
    if row.moe is not None and not layout.experts and expert_count(config):
        given.add(
            "experts-none",
            f"config.json speaks of {expert_count(config):,} experts, and no layer has any",
            "see whether shards are missing, or the config is another model's",
        )
    judged.stock = stock(
        plans[0],
        layout,
        row,
        given.config,
        config,
        changed,
        known=known,
        extern=given.extern,
    )
    applied = {w.id: w.why for w in row.workarounds}
    judged.ours = Ours("loads", steps(plans[0], layout, row, changed), applied)
    try:
        loads.refuse_quantized(given.place.folder, given.config, layout)
        plans.append(make_plan(layout, row, config, split=True))
    except UnsupportedCheckpointError:
        pass  # there is one setting then, which the table of memory shows
    _weigh(given, judged, plans, layout, config)
    return layout


def _weigh(
    given: Given,
    judged: _Judged,
    plans: Sequence[Plan],
    layout: Layout,
    config: Mapping[str, Any],
) -> None:
    assert given.config is not None
    module = (judged.module or "").rpartition(".")[2]
    try:
        judged.memory, found = memory(plans, layout.tensors, given.config, config, module)
    except CompatError:
        raise
    except (ValueError, ArithmeticError, LookupError) as error:
        given.add(
            "plan-impossible",
            f"the shapes of the tensors do not allow what has to be done to them ({error})",
            "download the checkpoint again",
        )
        return
    given.problems += found
