"""The one road from a checkpoint to a plan.

Headers and config give the registry row, the effective config, the layout, the plan, and every
fault that prevents a load. The load hook, ``inspect`` and ``convert`` all call ``make``, so
``inspect`` reports what a load does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.adapters import MERGE, adapter_file
from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.checkpoint.contents import check_contents
from vllm_moe_compat.checkpoint.files import FileFault
from vllm_moe_compat.checkpoint.findings import Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo, scan_headers, weight_files
from vllm_moe_compat.checkpoint.index import STALE, contradictions, read_index
from vllm_moe_compat.checkpoint.layout import Layout, detect
from vllm_moe_compat.errors import (
    CheckpointFileError,
    LayoutError,
    UnsupportedCheckpointError,
)
from vllm_moe_compat.families import modules, registry
from vllm_moe_compat.families.fixes.fix import ForwardFix
from vllm_moe_compat.families.fixes.rotary_frequencies import keep_original_length
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan import quantization
from vllm_moe_compat.plan.check_experts import check_experts
from vllm_moe_compat.plan.check_packed import check_packed
from vllm_moe_compat.plan.check_settings import check_settings
from vllm_moe_compat.plan.check_unreadable import check_unreadable
from vllm_moe_compat.plan.effective_config import Settings, effective_config, text_section
from vllm_moe_compat.plan.faults import (
    Fault,
    already_quantized,
    faults_of,
    needs_row,
    of_error,
    of_file,
    stays_packed,
    unmapped,
)
from vllm_moe_compat.plan.heads import KEY as TYING
from vllm_moe_compat.plan.heads import Heads, apply_tying, settle_heads
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.plan.planner import Plan, make_plan
from vllm_moe_compat.plan.serving import NONE, Serving
from vllm_moe_compat.plan.tensor_names import (
    TensorNames,
    uniform_names,
    unknown_names,
    unmerged,
    wrapped,
)
from vllm_moe_compat.plan.upstream import keeps_numbers


@dataclass(frozen=True, slots=True)
class Headers:
    """The headers and the index of a checkpoint, as far as they can be read.

    Attributes:
        folder: the checkpoint's folder.
        tensors: all tensors of the shards.
        index: tensor → file by the index; None without a readable index.
        sizes: shard → its bytes when its header was read.
        faults: faults of shards and index.
        extern: whether the folder has an ``hf_quant_config.json``.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    index: Mapping[str, str] | None
    sizes: Mapping[str, int]
    faults: tuple[FileFault, ...]
    extern: bool


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """A load as planned before a tensor is read.

    Attributes:
        original: the config as it was read.
        config: the effective config, from which the module is built.
        settings: the language model's settings, see ``effective_config.resolve``; empty without
            a row.
        fixes: forward fixes that the settings need, each with what it puts in, in words.
        max_length: tokens up to which the module computes what the settings say; None for any.
        max_length_reason: what it computes beyond that; empty without a limit.
        translated: see ``EffectiveConfig.translated``.
        module: import path of the mlx-lm module; empty if mlx-lm has none.
        row: the module's row, or None.
        reason: the reason for a missing row.
        headers: the checkpoint's headers; their ``tensors`` include extra tensors and have the
            names that ``plan.names`` gives them.
        layout: the checkpoint's layout; None if the config is invalid or has no module.
        plan: the plan; None if there is a fault or no row.
        serving: dtypes and quantisation setting of the load.
        faults: the faults, those of files first; the load is refused if there is one.
        needs_row: message about tensors that mlx-lm may not load correctly without a row.
        warnings: what a user should know of a load that is right.
    """

    original: Mapping[str, Any]
    config: dict[str, Any]
    settings: Settings
    fixes: tuple[tuple[ForwardFix, str], ...]
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
    max_length: int | None = None
    max_length_reason: str = ""
    warnings: tuple[Fault, ...] = ()

    def refuse(self) -> None:
        """Raise for the first fault.

        Raises:
            CompatError: there is a fault.
        """
        if not self.faults:
            return
        first, *others = self.faults
        rest = sum(fault.count for fault in others)
        more = f" (and {rest} more fault{'s' if rest > 1 else ''})" if rest else ""
        raise first.error(f"{first.message}{more}; {first.remedy}.")

    def spared(self, setting: str) -> set[str]:
        """Return the names of tensors that a quantisation setting does not quantise."""
        stored = () if self.layout is None else self.layout.numbers.weights
        tensors = self.headers.tensors if self.layout is None else self.layout.tensors
        return quantization.spared_tensors(self.original, tensors, stored, setting)

    def unpatched(self, reason: str) -> PlannedLoad:
        """Return the load for a class that cannot be wrapped: without a row and a plan."""
        assert self.layout is not None, "a row was found"
        config = effective_config(self.original).config
        folder, layout, serving = self.headers.folder, self.layout, self.serving
        return replace(
            self,
            config=config,
            row=None,
            fixes=(),
            reason=reason,
            plan=None,
            needs_row=needs_row(layout),
            faults=tuple(unmapped(folder, layout, config, self.module, reason, serving)),
        )

    def plan_for(self, setting: str) -> Plan | None:
        """Return the plan for another quantisation setting; None if it does not apply."""
        if self.plan is None or self.row is None or self.layout is None:
            return None
        serving = replace(self.serving, setting=setting)
        folder, extern = self.headers.folder, self.headers.extern
        if any(already_quantized(folder, self.original, self.layout, serving, extern=extern)):
            return None
        if any(stays_packed(folder, self.layout, serving)):
            return None
        split, exact = setting != NONE, serving.exact
        return make_plan(
            self.layout,
            self.row,
            self.config,
            split=split,
            exact=exact,
            checked=True,
            hold=not split,
        )


def read_headers_of(folder: Path) -> Headers:
    """Read headers and index of a folder; faults are recorded, not raised."""
    faults: list[FileFault] = []
    files = weight_files(folder)
    tensors = scan_headers(files, faults.append)
    sizes = {path.name: path.stat().st_size for path in files if path.is_file()}
    index = read_index(folder, faults.append)
    extern = (folder / "hf_quant_config.json").exists()
    return Headers(folder, tensors, index, sizes, tuple(faults), extern)


def name_module(config: dict[str, Any]) -> None:
    """Set ``model_type`` to the name of the mlx-lm module, in place; the rest stays."""
    row = modules.row_of_config(config)
    if row is not None:
        registry.name_module(row, config)


def make(headers: Headers, config: Mapping[str, Any], serving: Serving) -> PlannedLoad:
    """Plan a load.

    Args:
        headers: the checkpoint's headers.
        config: the config as it was read.
        serving: dtypes and quantisation setting of the load.
    """
    effective = copy.deepcopy(dict(config))
    faults = [of_file(fault) for fault in headers.faults]
    translated: tuple[str, ...] = ()
    layout, plan, unsafe = None, None, ""
    module, row, reason = "", None, ""
    settings: Settings = {}
    fixes: tuple[tuple[ForwardFix, str], ...] = ()
    longest: tuple[int | None, str] = (None, "")
    names, warnings = TensorNames(), list(_adapters_beside(headers.folder))
    try:
        name_module(effective)
        found = modules.find(effective)
        module, row, reason = found.path, found.row, found.reason
        if row is not None:
            made = effective_config(config)
            effective, settings, translated = made.config, made.settings, made.translated
            keep_original_length(text_section(config), settings)
            fixes = _fixes(row, settings)
            longest = _longest(row, settings)
            if any(fix.prepare for fix, _ in fixes):
                prepared = copy.deepcopy(dict(config))
                _prepare(prepared, fixes, settings)
                made = effective_config(prepared)
                effective, translated = made.config, made.translated
            of_index, stale = _index_faults(headers, effective, row)
            faults += of_index
            warnings += stale
            names = uniform_names(headers.tensors, row, row.ignored.of(effective))
            heads = settle_heads(
                headers.folder,
                names.of(headers.tensors),
                headers.tensors,
                effective,
                row,
                tied=settings.get(TYING),
            )
            if apply_tying(effective, heads.tie):
                translated += (TYING,)
            names = _with_heads(names, heads, headers.tensors)
            headers = replace(headers, tensors=names.of(headers.tensors))
            wrong, unknown = check_settings(module, config, settings)
            faults += wrong
            warnings += unknown
            layout = detect(headers.tensors, effective, row.ignored)
            foreign = [*unmerged(layout.tensors)] or [
                *unknown_names(layout.tensors, row, modules.mlx_lm().words_of(row))
            ]
            faults += foreign or heads.faults
            warnings += heads.warnings
        elif module:
            faults.clear()  # Without a row, files are left to mlx-lm.
            layout = detect(headers.tensors, {})
            if reason != modules.OWN_CODE:
                faults += [*unmerged(layout.tensors), *wrapped(layout.tensors, module)]
    except UnsupportedCheckpointError as error:
        faults.append(of_error("config-unsupported", error))
    except LayoutError as error:
        faults.append(of_error("config-number", error))
    if layout is not None and row is None:
        unsafe = needs_row(layout)
        faults += unmapped(headers.folder, layout, config, module, reason, serving)
    elif layout is not None and row is not None:
        faults += already_quantized(headers.folder, config, layout, serving, extern=headers.extern)
        plan, found_faults = _plan(layout, row, effective, serving, headers)
        faults += found_faults
        if plan is not None:
            plan = replace(plan, names=names)
            faults += stays_packed(headers.folder, layout, serving)
            _settle_quantization(effective, layout, plan, serving)
    faults.sort(key=lambda fault: fault.error is not CheckpointFileError)
    return PlannedLoad(
        original=config,
        config=effective,
        settings=settings,
        fixes=fixes,
        translated=translated,
        module=module,
        row=row,
        reason=reason,
        headers=headers,
        layout=layout,
        plan=None if faults else plan,
        serving=serving,
        faults=tuple(faults),
        needs_row=unsafe,
        max_length=longest[0],
        max_length_reason=longest[1],
        warnings=tuple(warnings),
    )


def make_from_tensors(
    tensors: Mapping[str, TensorInfo],
    row: Row,
    config: Mapping[str, Any],
    serving: Serving,
    *,
    direct: bool,
) -> Plan:
    """Plan for tensors passed to ``sanitize`` without a preceding ``load_config``.

    Args:
        tensors: descriptions of the tensors.
        row: the class's row.
        config: the settings that the model instance has.
        serving: dtypes and quantisation setting of the load.
        direct: see ``make_plan``.

    Raises:
        CompatError: the tensors cannot be loaded correctly.
    """
    names = uniform_names(tensors, row, row.ignored.of(config))
    layout = detect(names.of(tensors), config, row.ignored)
    split = serving.setting != NONE
    plan = make_plan(layout, row, config, split=split, exact=serving.exact, direct=direct)
    return replace(plan, names=names)


def _fixes(row: Row, settings: Settings) -> tuple[tuple[ForwardFix, str], ...]:
    """Return the forward fixes that the settings need, with what each puts in."""
    each = ((fix, fix.needed(settings)) for fix in row.fixes)
    return tuple((fix, words) for fix, words in each if words is not None)


def _longest(row: Row, settings: Settings) -> tuple[int | None, str]:
    """Return the lowest of the row's limits of length, with its reason."""
    each = ((limit.longest(settings), limit.why) for limit in row.limits)
    found = [(tokens, why) for tokens, why in each if tokens is not None]
    return min(found, default=(None, ""))


def _prepare(
    config: dict[str, Any], fixes: tuple[tuple[ForwardFix, str], ...], settings: Settings
) -> None:
    """Change a config so that mlx-lm can build the module, in place."""
    text = config.get("text_config")
    for fix, _ in fixes:
        if fix.prepare is not None:
            fix.prepare(text if isinstance(text, dict) else config, settings)


def _plan(
    layout: Layout,
    row: Row,
    config: Mapping[str, Any],
    serving: Serving,
    headers: Headers,
) -> tuple[Plan | None, list[Fault]]:
    """Return the plan, or the faults that prevent it."""
    try:
        findings: list[Finding] = list(check_unreadable(layout, config, row))
        if not keeps_numbers(row, layout):
            findings += layout.numbers.findings()
            findings += check_packed(layout, row)
            findings += check_experts(layout, row, config)
        if not findings:
            findings += check_contents(headers.folder, headers.tensors, layout.numbers)
        if faults := list(faults_of(findings, headers.tensors)):
            return None, faults
        split = serving.setting != NONE
        plan = make_plan(
            layout,
            row,
            config,
            split=split,
            exact=serving.exact,
            checked=True,
            hold=not split,
        )
        return plan, []
    except LayoutError as error:
        return None, [of_error("config-number", error)]


def _settle_quantization(
    config: dict[str, Any], layout: Layout, plan: Plan, serving: Serving
) -> None:
    """Make the config describe the weights that ``load_model`` receives after the plan."""
    entry = next(iter(quantization_configs(config)), None)
    packed = any(name.endswith(".scales") for name in layout.tensors)
    if serving.setting != NONE:
        quantization.announce(config, QUANTIZE_SETTINGS[serving.setting])
    elif (held := quantization.commonest_held(plan.builds)) is not None:
        quantization.announce(config, held)
    elif plan.dequantized:
        quantization.mark_dequantized(config)
    elif entry is not None and config.get("quantization") is None:
        if "quant_method" not in entry and {"bits", "group_size"} <= entry.keys():
            config["quantization"] = dict(entry)  # MLX's own settings, under the other key.
        elif entry.get("quant_method") == "modelopt" and not packed and not plan.digested:
            quantization.mark_dequantized(config)  # It concerns the KV cache alone.


def _index_faults(
    headers: Headers, config: Mapping[str, Any], row: Row
) -> tuple[list[Fault], list[Fault]]:
    """Return the contradictions between index and shards: faults, and those of a stale index."""
    if headers.index is None:
        return [], []
    ignored = row.ignored.of(config)
    found = map(of_file, contradictions(headers.folder, headers.index, headers.tensors, ignored))
    faults: list[Fault] = []
    stale: list[Fault] = []
    for fault in found:
        (stale if fault.id == STALE else faults).append(fault)
    return faults, stale


def _adapters_beside(folder: Path) -> Iterator[Fault]:
    """Yield a warning if an adapter lies beside the weights."""
    name = adapter_file(folder)
    if name is not None:
        yield Fault(
            "adapter-beside",
            f"{name}: an adapter lies beside the model's weights and is not applied",
            f"nothing has to be done if the model alone is wanted; else {MERGE}",
            UnsupportedCheckpointError,
        )


def _with_heads(names: TensorNames, heads: Heads, tensors: Mapping[str, TensorInfo]) -> TensorNames:
    """Return the changes of names with those that the output head needs."""
    before, after = dict(names.renamed), dict(heads.renamed)
    again = {
        name: after[before.get(name, name)]
        for name in (tensors if after else ())
        if before.get(name, name) in after
    }
    words = list(names.words)
    words += ["took the output head for the embeddings"] if again else []
    words += [f"copied {b!r} to {a!r}" for a, b in heads.copies]
    words += [f"left out {name!r}, a copy of the embeddings" for name in heads.drops]
    return replace(
        names,
        renamed=tuple((before | again).items()),
        copies=heads.copies,
        drops=heads.drops,
        words=tuple(words),
    )
