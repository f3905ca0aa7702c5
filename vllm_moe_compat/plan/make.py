"""The one road from a checkpoint to a plan.

A folder, or headers, and a config give the registry row, the effective config, the layout,
the plan, and every fault in the way. The load hook, ``inspect`` and ``convert`` call it,
so what ``inspect`` says is what a load does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.checkpoint.files import FileFault
from vllm_moe_compat.checkpoint.findings import Finding, grouped
from vllm_moe_compat.checkpoint.headers import TensorInfo, scan_headers, weight_files
from vllm_moe_compat.checkpoint.index import contradictions, read_index
from vllm_moe_compat.checkpoint.layout import Layout, detect
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.errors import (
    CheckpointFileError,
    CompatError,
    LayoutError,
    UnsupportedCheckpointError,
)
from vllm_moe_compat.families import modules, registry
from vllm_moe_compat.families.modules import OWN_CODE
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan import quantization
from vllm_moe_compat.plan.check_experts import check_experts
from vllm_moe_compat.plan.check_packed import check_packed
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.plan.planner import Plan, make_plan
from vllm_moe_compat.plan.serving import NONE, Serving
from vllm_moe_compat.plan.upstream import keeps_numbers

_RANKS = {0: "experts-twice", 1: "experts-gap", 2: "experts-contradict", 3: "experts-unlike"}


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that keeps a checkpoint from being loaded right.

    Attributes:
        id: the kind of fault, for programs.
        message: the file, tensor or setting, what was found, what was expected.
        remedy: what to do about it.
        error: the exception that a load raises.
        count: how many tensors have it.
    """

    id: str
    message: str
    remedy: str
    error: type[CompatError]
    count: int = 1


@dataclass(frozen=True, slots=True)
class Headers:
    """The headers and the index of a checkpoint, as far as they can be read.

    Attributes:
        folder: of the checkpoint.
        tensors: all tensors of the shards.
        index: name → file, by the index; None where there is none that can be read.
        sizes: bytes of each shard when it was read.
        faults: what could not be read.
        extern: whether there is an ``hf_quant_config.json``.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    index: Mapping[str, str] | None
    sizes: Mapping[str, int]
    faults: tuple[FileFault, ...]
    extern: bool


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """What is known of a load before a tensor is read.

    Attributes:
        original: the config as it was read.
        config: the effective config: the one that the module is built from.
        translated: ids of the settings that were translated for mlx-lm.
        module: import path of the mlx-lm module; empty where mlx-lm has none.
        row: of the module; None where there is none.
        reason: why there is no row.
        headers: of the checkpoint; its ``tensors`` hold the ignored ones too.
        layout: of the tensors; None where the config does not allow to tell.
        plan: what is done to them; None where something is wrong or nothing is known.
        serving: what the load is for.
        faults: the gravest first; with any, the load is refused.
        needs_row: tensors that mlx-lm may not load right without a row, in words.
    """

    original: Mapping[str, Any]
    config: dict[str, Any]
    translated: tuple[str, ...]
    module: str
    row: Row | None
    reason: str
    headers: Headers
    layout: Layout | None
    plan: Plan | None
    serving: Serving
    faults: tuple[Fault, ...]
    needs_row: str = ""

    def refuse(self) -> None:
        """Raise for the gravest fault.

        Raises:
            CompatError: there is one.
        """
        if not self.faults:
            return
        first, *others = self.faults
        rest = sum(fault.count for fault in others)
        more = f" (and {rest} more fault{'s' if rest > 1 else ''})" if rest else ""
        raise first.error(f"{first.message}{more}; {first.remedy}.")

    def spared(self, setting: str) -> set[str]:
        """Return the tensors that a quantisation setting leaves as they are."""
        stored = () if self.layout is None else self.layout.numbers.weights
        tensors = self.headers.tensors if self.layout is None else self.layout.tensors
        return quantization.spared_tensors(self.original, tensors, stored, setting)

    def unpatched(self, reason: str) -> PlannedLoad:
        """Return the load as it is where the class of the row cannot be wrapped."""
        config = copy.deepcopy(dict(self.original))
        translate(config)
        assert self.layout is not None, "a row was found"
        return replace(
            self,
            config=config,
            row=None,
            reason=reason,
            plan=None,
            needs_row=_needs_row(self.layout),
            faults=tuple(_unmapped(self.headers, self.layout, self.module, reason, self.serving)),
        )

    def plan_for(self, setting: str) -> Plan | None:
        """Return the plan for another quantisation setting; None where it does not apply."""
        if self.plan is None or self.row is None or self.layout is None:
            return None
        serving = replace(self.serving, setting=setting)
        if any(_already_quantized(self.headers, self.original, self.layout, serving)):
            return None
        split, exact = setting != NONE, serving.exact
        return make_plan(self.layout, self.row, self.config, split=split, exact=exact)


def read_headers_of(folder: Path) -> Headers:
    """Read headers and index of a folder; faults are listed, not raised."""
    faults: list[FileFault] = []
    files = weight_files(folder)
    tensors = scan_headers(files, faults.append)
    sizes = {path.name: path.stat().st_size for path in files if path.is_file()}
    index = read_index(folder, faults.append)
    extern = (folder / "hf_quant_config.json").exists()
    return Headers(folder, tensors, index, sizes, tuple(faults), extern)


def translate(config: dict[str, Any]) -> tuple[str, ...]:
    """Translate a config's keys for its mlx-lm module, in place; return what was changed.

    Raises:
        UnsupportedCheckpointError: a setting that the module cannot represent.
    """
    row = modules.row_of_config(config)
    return () if row is None else tuple(registry.translate_config(row, config))


def make(headers: Headers, config: Mapping[str, Any], serving: Serving) -> PlannedLoad:
    """Plan a load.

    Args:
        headers: of the checkpoint.
        config: as it was read.
        serving: what the load is for.
    """
    effective = copy.deepcopy(dict(config))
    faults = [_of_file(fault) for fault in headers.faults]
    translated: tuple[str, ...] = ()
    layout, plan, needs_row = None, None, ""
    module, row, reason = "", None, ""
    try:
        translated = translate(effective)
        found = modules.find(effective)
        module, row, reason = found.path, found.row, found.reason
        if row is not None:
            faults += map(_of_file, _index_faults(headers, effective, row))
            layout = detect(headers.tensors, effective, row.ignored)
        elif module:
            faults.clear()  # Files are mlx-lm's to judge then.
            layout = detect(headers.tensors, {})
    except UnsupportedCheckpointError as error:
        faults.append(_of_error("config-unsupported", error))
    except LayoutError as error:
        faults.append(_of_error("config-number", error))
    if layout is not None and row is None:
        needs_row = _needs_row(layout)
        faults += _unmapped(headers, layout, module, reason, serving)
    elif layout is not None and row is not None:
        faults += _already_quantized(headers, config, layout, serving)
        plan, found_faults = _plan(layout, row, effective, serving, headers.tensors)
        faults += found_faults
        if plan is not None:
            _settle_quantization(effective, layout, plan, serving)
    faults.sort(key=lambda fault: fault.error is not CheckpointFileError)
    return PlannedLoad(
        original=config,
        config=effective,
        translated=translated,
        module=module,
        row=row,
        reason=reason,
        headers=headers,
        layout=layout,
        plan=None if faults else plan,
        serving=serving,
        faults=tuple(faults),
        needs_row=needs_row,
    )


def make_from_tensors(
    tensors: Mapping[str, TensorInfo],
    row: Row,
    config: Mapping[str, Any],
    serving: Serving,
    *,
    direct: bool,
) -> Plan:
    """Plan for tensors that ``sanitize`` was given and no ``load_config`` announced.

    Args:
        tensors: their descriptions.
        row: of the class.
        config: as far as the model instance knows it.
        serving: what the load is for.
        direct: see ``make_plan``.

    Raises:
        CompatError: they cannot be loaded right.
    """
    layout = detect(tensors, config, row.ignored)
    split = serving.setting != NONE
    return make_plan(layout, row, config, split=split, exact=serving.exact, direct=direct)


def faults_of(findings: Iterable[Finding], tensors: Mapping[str, TensorInfo]) -> Iterator[Fault]:
    """Yield equal findings as one fault, the gravest first."""
    for first, message, count in grouped(findings, tensors):
        if first.error is UnsupportedCheckpointError:
            id = f"{first.topic}-unsupported"
        else:
            id = _RANKS[first.rank] if first.topic == "experts" else f"{first.topic}-scales"
        yield Fault(id, message, first.remedy, first.error, count)


def _plan(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    serving: Serving,
    tensors: Mapping[str, TensorInfo],
) -> tuple[Plan | None, list[Fault]]:
    """Return the plan, or the faults that keep it from being made."""
    try:
        findings: list[Finding] = []
        if not keeps_numbers(row, layout):
            findings += layout.numbers.findings()
            findings += check_packed(layout, row, config)
            findings += check_experts(layout, row, config)
        if faults := list(faults_of(findings, tensors)):
            return None, faults
        split = serving.setting != NONE
        return make_plan(layout, row, config, split=split, exact=serving.exact), []
    except LayoutError as error:
        return None, [_of_error("config-number", error)]


def _settle_quantization(
    config: dict[str, Any], layout: Layout, plan: Plan, serving: Serving
) -> None:
    """Have the config describe the weights as they will be when ``load_model`` gets them."""
    entry = next(iter(quantization_configs(config)), None)
    packed = any(name.endswith(".scales") for name in layout.tensors)
    if serving.setting != NONE:
        quantization.announce(config, QUANTIZE_SETTINGS[serving.setting])
    elif plan.dequantized:
        quantization.mark_dequantized(config)
    elif entry is not None and config.get("quantization") is None:
        if "quant_method" not in entry and {"bits", "group_size"} <= entry.keys():
            config["quantization"] = dict(entry)  # MLX's own, as some uploads have it.
        elif entry.get("quant_method") == "modelopt" and not packed and not plan.digested:
            quantization.mark_dequantized(config)  # Of the KV cache alone: weights are floats.


def _index_faults(headers: Headers, config: Mapping[str, Any], row: Row) -> Iterator[FileFault]:
    """Yield where the shards do not hold what the index says."""
    if headers.index is None:
        return
    ignored = row.ignored.of(config)
    yield from contradictions(headers.folder, headers.index, headers.tensors, ignored)


def _already_quantized(
    headers: Headers, config: Mapping[str, Any], layout: Layout, serving: Serving
) -> Iterator[Fault]:
    if serving.setting == NONE:
        return
    shown = quantization.already_quantized(config, layout, extern=headers.extern)
    if shown is not None:
        yield Fault(
            "quantized-already",
            f"{headers.folder}: the checkpoint is quantised already ({shown}), where bf16 or "
            "block-FP8 weights were expected",
            f"unset {QUANTIZE.name} to load it as it is",
            UnsupportedCheckpointError,
        )


def _unmapped(
    headers: Headers, layout: Layout, module: str, reason: str, serving: Serving
) -> Iterator[Fault]:
    """Yield why a module that is not wrapped cannot load the checkpoint right."""
    if reason == OWN_CODE:
        return
    if serving.setting != NONE:
        yield Fault(
            "quantize-unmapped",
            f"{headers.folder}: {module} cannot be quantised while loading, since {reason}",
            f"unset {QUANTIZE.name}, or quantise the checkpoint with `mlx_lm.convert -q`",
            UnsupportedCheckpointError,
        )
    weights = [*layout.numbers.weights, *layout.numbers.stray]
    if weights:
        forms = " and ".join(sorted({f.form.name.upper() for f in layout.numbers.found}))
        verb = "are" if len(weights) > 1 else "is"
        yield Fault(
            f"{layout.numbers.found[0].form.name}-unmapped",
            f"{layout.weights[weights[0]].file}: {fold(weights)} {verb} {forms}, which {module} "
            f"takes for integers, and it cannot be patched, since {reason}",
            "load a bf16 release of the model instead",
            UnsupportedCheckpointError,
            len(weights),
        )


def _needs_row(layout: Layout) -> str:
    """Name the tensors that mlx-lm may not load right without a row; empty for none."""
    parts = [
        f"{len(found.weights) + len(found.stray()):,} {found.form.name.upper()} weights"
        for found in layout.numbers.found
        if found.weights or found.stray()
    ]
    if layout.per_expert:
        parts.append(f"{len(layout.per_expert):,} per-expert weights")
    return " and ".join(parts)


def _of_file(fault: FileFault) -> Fault:
    return Fault(fault.id, fault.message, fault.remedy, CheckpointFileError)


def _of_error(id: str, error: CompatError) -> Fault:
    message, _, remedy = str(error).removesuffix(".").rpartition("; ")
    return Fault(id, message or remedy, remedy if message else "", type(error))
