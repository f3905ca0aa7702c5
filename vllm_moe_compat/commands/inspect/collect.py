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
from vllm_moe_compat.checkpoint.file_stamps import FileStamps
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.index import STALE, contradictions
from vllm_moe_compat.checkpoint.layout import Layout, detect
from vllm_moe_compat.commands.inspect import describe
from vllm_moe_compat.commands.inspect.model import (
    Architecture,
    Extra,
    Inspection,
    Memory,
    PluginResult,
    PredictionHeads,
    Problem,
    Ranks,
    Stock,
)
from vllm_moe_compat.commands.inspect.needs import memory
from vllm_moe_compat.commands.inspect.prediction_heads import describe_heads
from vllm_moe_compat.commands.inspect.problems import FILES, clean, of_fault, problem
from vllm_moe_compat.commands.inspect.ranks import ranks as describe_ranks
from vllm_moe_compat.commands.inspect.read import Contents, read
from vllm_moe_compat.commands.inspect.steps import steps
from vllm_moe_compat.commands.inspect.stock import REFUSES, UNKNOWN, stock
from vllm_moe_compat.commands.locate import locate
from vllm_moe_compat.errors import CompatError, LayoutError
from vllm_moe_compat.families import modules
from vllm_moe_compat.families.modules import OWN_CODE
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.config_class import installed
from vllm_moe_compat.plan.faults import of_error
from vllm_moe_compat.plan.make import make
from vllm_moe_compat.plan.planned_load import Headers, PlannedLoad
from vllm_moe_compat.plan.serving import installed_device, serving

SHOWN = 8
"""Maximum number of findings of one kind that are listed; duplicates are merged."""


@dataclass(slots=True)
class _Outcome:
    """The parts of the result that depend on the planned load."""

    count: int = 1
    tensors: Mapping[str, TensorInfo] | None = None
    module: str | None = None
    row: Row | None = None
    stock: Stock | None = None
    ours: PluginResult | None = None
    memory: Memory | None = None
    ranks: Ranks | None = None
    heads: PredictionHeads | None = None


def inspect(name: str, ranks: int = 1) -> Inspection:
    """Inspect a folder, a shard or a repository in the hub's cache.

    With several ``ranks``, what each of them would hold is described too.

    Raises:
        SettingError: there is no such checkpoint, or an environment variable is not valid.
    """
    contents = read(locate(name))
    config = contents.config or {}
    outcome, layout = _Outcome(count=ranks), None
    if contents.config is not None and contents.tensors and contents.location.shard is None:
        layout = _plan_load(contents, outcome)
    elif contents.index is not None:
        every = DEFAULT_EXTRAS.of({})
        for fault in contradictions(
            contents.location.folder, contents.index, contents.tensors, every
        ):
            contents.fault(fault)
    layout = layout or _detect(contents, config)
    extras = _extras(contents, layout, outcome) if layout is not None else []
    for extra in extras:
        if extra.agree is False:
            has = f"the checkpoint has {extra.kind} tensors ({extra.tensors:,})"
            says = "config.json describes"
            contents.add(
                f"{extra.kind}-disagree",
                f"{says} {extra.kind} tensors, and the checkpoint has none"
                if extra.in_config
                else f"{has} that config.json does not describe",
                "nothing has to be done: text is served without them",
            )
    kinds = config.get("architectures")
    kinds = kinds if isinstance(kinds, list) else [kinds] if kinds else []
    kind = config.get("model_type")
    findings = _sorted(contents.problems)
    ours = outcome.ours or PluginResult(REFUSES if _errors(findings) else UNKNOWN, [])
    if _errors(findings):
        ours = PluginResult(REFUSES, ours.steps, ours.workarounds)
    return Inspection(
        path=clean(
            contents.location.folder
            if contents.location.shard is None
            else contents.location.shard,
            1000,
        ),
        repository=contents.location.repository,
        tool=f"vllm-moe-compat {__version__}",
        verdict=ours.verdict,
        exit_code=_code(findings),
        findings=findings,
        files=describe.files(contents.tensors, contents.shards),
        architecture=Architecture(
            clean(kind, 100) if kind is not None else None,
            [clean(k, 100) for k in kinds[:8]],
            outcome.module,
            outcome.row is not None,
            modules.mlx_lm().version,
        ),
        experts=describe.experts(layout) if layout is not None else None,
        quantization=(
            describe.quantization(layout, config, contents.extern)
            if layout is not None and contents.tensors
            else None
        ),
        extras=extras,
        stock=outcome.stock,
        ours=ours,
        memory=outcome.memory,
        ranks=outcome.ranks,
        prediction_heads=outcome.heads,
    )


def _extras(contents: Contents, layout: Layout, outcome: _Outcome) -> list[Extra]:
    tensors = contents.tensors if outcome.tensors is None else outcome.tensors
    try:
        return describe.extras(layout, tensors, contents.config)
    except LayoutError as error:
        contents.problems.append(of_fault(of_error("config-number", error)))
        return describe.extras(layout, tensors, {})


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


def _detect(contents: Contents, config: Mapping[str, Any]) -> Layout | None:
    try:
        return detect(contents.tensors, config)
    except LayoutError as error:
        contents.problems.append(of_fault(of_error("config-number", error)))
        return None


def _plan_load(contents: Contents, outcome: _Outcome) -> Layout | None:
    """Plan the load, add its faults, and return the layout if it was detected."""
    assert contents.config is not None
    if not isinstance(contents.config.get("model_type"), str):
        contents.add(
            "model-type",
            f"config.json: model_type is {contents.config.get('model_type')!r}, where a name was "
            "expected",
            "download the config again",
        )
        return None
    # The faults of the files are among the findings already.
    headers = Headers(
        contents.location.folder,
        contents.tensors,
        contents.index,
        FileStamps(),
        (),
        contents.extern is not None,
    )
    planned = make(headers, contents.config, serving(installed_device()))
    contents.problems += map(of_fault, (*planned.faults, *planned.warnings))
    outcome.tensors = planned.headers.tensors
    if any(warning.id == STALE for warning in planned.warnings):
        contents.problems = [p for p in contents.problems if p.id != "index-extra"]
    outcome.module, outcome.row = planned.module or None, planned.row
    if planned.row is not None and not installed():
        contents.add(
            "settings-unresolved",
            "transformers is not installed: settings that config.json leaves out are taken from "
            "the defaults that are recorded, or are mlx-lm's",
            "install transformers",
        )
    if planned.reason == OWN_CODE:
        contents.add(
            "own-code",
            f"config.json asks for {contents.config['model_file']!r}, the checkpoint's own code",
            "read it before you allow it with trust_remote_code",
        )
        outcome.module = None
    elif outcome.module is None and not planned.faults:
        contents.add(
            "module-unknown",
            f"mlx-lm {modules.mlx_lm().version or ''} has no module for model_type "
            f"{contents.config['model_type']!r}",
            "see whether a newer mlx-lm has one",
        )
        outcome.stock = Stock(REFUSES, ["it has no module for this model_type"])
    elif planned.layout is not None and planned.row is None:
        _describe_unmapped(contents, outcome, planned, planned.layout)
    elif planned.layout is not None and planned.row is not None:
        _describe_mapped(contents, outcome, planned, planned.layout, planned.row)
    return planned.layout


def _describe_unmapped(
    contents: Contents, outcome: _Outcome, planned: PlannedLoad, layout: Layout
) -> None:
    """Describe the load of a module without a row."""
    outcome.stock = Stock(UNKNOWN, [f"the registry has no row for {outcome.module}"])
    # mlx-lm loads all shards and reads no index, so faults of the index do not stop it.
    contents.problems = [
        replace(p, severity="warning") if p.id.startswith(("index-", "tensor-duplicate")) else p
        for p in contents.problems
    ]
    if planned.faults:
        return
    if layout.per_expert:
        contents.add(
            "experts-unmapped",
            f"{len(layout.per_expert):,} per-expert weights are left to {outcome.module} as they "
            "are, since there is no row for it",
            "see whether mlx-lm stacks them itself, or ask for a row",
        )
    contents.add(
        "module-unmapped", f"{outcome.module} has no row: mlx-lm loads it without the plugin's help"
    )
    outcome.ours = PluginResult(UNKNOWN, [])
    _add_memory(contents, outcome, planned)


def _describe_mapped(
    contents: Contents, outcome: _Outcome, planned: PlannedLoad, layout: Layout, row: Row
) -> None:
    """Describe the load of a module with a row."""
    assert contents.config is not None
    if planned.plan is None:
        outcome.ours = PluginResult(REFUSES, [])
        return
    if planned.max_length is not None:
        contents.add(
            "length-limited",
            f"the answers are right up to {planned.max_length:,} tokens, since beyond that "
            f"{planned.max_length_reason}",
            f"leave --max-model-len out, or set it to at most {planned.max_length}",
        )
    if row.moe is not None and not layout.experts and (count := expert_count(planned.config)):
        contents.add(
            "experts-none",
            f"config.json sets {count:,} experts, and no layer has any",
            "check whether shards are missing or the config belongs to another model",
        )
    known = modules.mlx_lm().folder is None or bool(modules.find(contents.config).path)
    put_in = [words for _, words in planned.fixes]
    alone = planned.plan
    if alone.complete and (plan := planned.plan_for(planned.serving.setting, complete=False)):
        alone = replace(plan, names=alone.names)
    outcome.stock = stock(
        alone,
        layout,
        row,
        contents.config,
        [words for fix, words in planned.fixes if not fix.slight],
        planned.translated,
        known=known,
        extern=contents.extern,
    )
    applied = {w.id: w.why for w in row.workarounds}
    outcome.ours = PluginResult(
        "loads", steps(planned.plan, layout, row, planned.translated, put_in), applied
    )
    _add_memory(contents, outcome, planned)
    outcome.heads = describe_heads(planned)


def _add_memory(contents: Contents, outcome: _Outcome, planned: PlannedLoad) -> None:
    try:
        outcome.memory, found = memory(planned)
        if outcome.count > 1:
            outcome.ranks = describe_ranks(planned, outcome.count)
    except CompatError:
        raise
    except (ValueError, ArithmeticError, LookupError) as error:
        contents.add(
            "plan-impossible",
            f"the shapes of the tensors do not fit the planned operations ({error})",
            "download the checkpoint again",
        )
        return
    contents.problems += found
