"""Make an ``Inspection`` of a path: plan the load without running it.

The order is that of a load: config, headers, index, module, layout, plan, memory. Every
fault becomes a finding, and the remaining parts are still described.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_moe_compat import __version__
from vllm_moe_compat.checkpoint.config import expert_count
from vllm_moe_compat.checkpoint.extras import DEFAULT_EXTRAS
from vllm_moe_compat.checkpoint.index import contradictions
from vllm_moe_compat.checkpoint.layout import Layout, detect
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
from vllm_moe_compat.commands.inspect.problems import FILES, clean, of_error, of_load, problem
from vllm_moe_compat.commands.inspect.read import Given, read
from vllm_moe_compat.commands.inspect.steps import steps
from vllm_moe_compat.commands.inspect.stock import REFUSES, UNKNOWN, stock
from vllm_moe_compat.errors import CompatError, LayoutError
from vllm_moe_compat.families import modules
from vllm_moe_compat.families.modules import OWN_CODE
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.make import Headers, PlannedLoad, make
from vllm_moe_compat.plan.serving import installed_device, serving

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
    elif given.index is not None:
        every = DEFAULT_EXTRAS.of({})
        for fault in contradictions(given.place.folder, given.index, given.tensors, every):
            given.fault(fault)
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
    """Plan the load, note what it says, and return the layout, if it came to that."""
    assert given.config is not None
    if not isinstance(given.config.get("model_type"), str):
        given.add(
            "model-type",
            f"config.json: model_type is {given.config.get('model_type')!r}, where a name was "
            "expected",
            "download the config again",
        )
        return None
    # Faults of the files are found already.
    headers = Headers(
        given.place.folder, given.tensors, given.index, {}, (), given.extern is not None
    )
    planned = make(headers, given.config, serving(installed_device()))
    given.problems += map(of_load, planned.faults)
    judged.module, judged.row = planned.module or None, planned.row
    if planned.reason == OWN_CODE:
        given.add(
            "own-code",
            f"config.json asks for {given.config['model_file']!r}, code that the checkpoint brings",
            "read it before you allow it with trust_remote_code",
        )
        judged.module = None
    elif judged.module is None and not planned.faults:
        given.add(
            "module-unknown",
            f"mlx-lm {modules.mlx_lm().version or ''} has no module for model_type "
            f"{given.config['model_type']!r}",
            "see whether a newer mlx-lm has one",
        )
        judged.stock = Stock(REFUSES, ["it has no module for this model_type"])
    elif planned.layout is not None and planned.row is None:
        _judge_unmapped(given, judged, planned, planned.layout)
    elif planned.layout is not None and planned.row is not None:
        _judge_mapped(given, judged, planned, planned.layout, planned.row)
    return planned.layout


def _judge_unmapped(given: Given, judged: _Judged, planned: PlannedLoad, layout: Layout) -> None:
    """Note what the load does with a module without a row."""
    judged.stock = Stock(UNKNOWN, [f"the registry has no row for {judged.module}"])
    # mlx-lm loads all shards and reads no index: what they repeat or lack does not stop it.
    given.problems = [
        replace(p, severity="warning") if p.id.startswith(("index-", "tensor-duplicate")) else p
        for p in given.problems
    ]
    if planned.faults:
        return
    if layout.per_expert:
        given.add(
            "experts-unmapped",
            f"{len(layout.per_expert):,} per-expert weights are left to {judged.module} as they "
            "are, since there is no row for it",
            "see whether mlx-lm stacks them itself, or ask for a row",
        )
    given.add("module-unmapped", f"{judged.module} has no row: mlx-lm loads it by itself")
    judged.ours = Ours(UNKNOWN, [])
    _weigh(given, judged, planned)


def _judge_mapped(
    given: Given, judged: _Judged, planned: PlannedLoad, layout: Layout, row: Row
) -> None:
    """Note what the load does with a module that has a row."""
    assert given.config is not None
    if planned.plan is None:
        judged.ours = Ours(REFUSES, [])
        return
    if row.moe is not None and not layout.experts and (count := expert_count(planned.config)):
        given.add(
            "experts-none",
            f"config.json speaks of {count:,} experts, and no layer has any",
            "see whether shards are missing, or the config is another model's",
        )
    known = modules.mlx_lm().folder is None or bool(modules.find(given.config).path)
    judged.stock = stock(
        planned.plan,
        layout,
        row,
        given.config,
        planned.config,
        planned.translated,
        known=known,
        extern=given.extern,
    )
    applied = {w.id: w.why for w in row.workarounds}
    judged.ours = Ours("loads", steps(planned.plan, layout, row, planned.translated), applied)
    _weigh(given, judged, planned)


def _weigh(given: Given, judged: _Judged, planned: PlannedLoad) -> None:
    module = (judged.module or "").rpartition(".")[2]
    try:
        judged.memory, found = memory(planned, planned.config, module)
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
