"""The one road from a checkpoint to a plan.

Headers and config give the registry row, the effective config, the layout, the plan, and every
fault that prevents a load. The load hook, ``inspect`` and ``convert`` all call ``make``, so
``inspect`` reports what a load does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_moe_compat.checkpoint.config import decode_floats, quantization_configs
from vllm_moe_compat.checkpoint.contents import check_contents
from vllm_moe_compat.checkpoint.findings import Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import Layout, detect
from vllm_moe_compat.errors import (
    CheckpointFileError,
    LayoutError,
    UnsupportedCheckpointError,
)
from vllm_moe_compat.families import modules, registry
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan import quantization
from vllm_moe_compat.plan.check_expert_cache import with_cache_checked
from vllm_moe_compat.plan.check_experts import check_experts
from vllm_moe_compat.plan.check_packed import check_packed
from vllm_moe_compat.plan.check_unreadable import check_unreadable
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
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.plan.planned_load import Headers, PlannedLoad
from vllm_moe_compat.plan.planner import Plan, make_plan
from vllm_moe_compat.plan.serving import NONE, Serving
from vllm_moe_compat.plan.settle_names import adapters_beside, settle_names
from vllm_moe_compat.plan.settle_settings import SettledSettings, settle_settings
from vllm_moe_compat.plan.tensor_names import TensorNames, uniform_names, unmerged, wrapped
from vllm_moe_compat.plan.upstream import keeps_numbers


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
    config = decode_floats(config)
    settled = SettledSettings(copy.deepcopy(config))
    faults = [of_file(fault) for fault in headers.faults]
    warnings = list(adapters_beside(headers.folder))
    layout, plan, unsafe = None, None, ""
    module, row, reason = "", None, ""
    names, tying_changed = TensorNames(), False
    try:
        name_module(settled.config)
        found = modules.find(settled.config)
        module, row, reason = found.path, found.row, found.reason
        if row is not None:
            settled = settle_settings(module, row, config)
            named = settle_names(headers, row, settled.config, tied=settled.settings.get(TYING))
            headers, names, layout = named.headers, named.names, named.layout
            tying_changed = named.tying_changed
            faults += [*settled.faults, *named.faults]
            warnings += [*settled.warnings, *named.warnings]
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
        plan, of_plan = _plan(layout, row, settled.config, serving, headers)
        faults += of_plan
        if plan is not None:
            plan = replace(plan, names=names)
            faults += stays_packed(headers.folder, layout, serving)
            _settle_quantization(settled.config, layout, plan, serving)
    faults.sort(key=lambda fault: fault.error is not CheckpointFileError)
    planned = PlannedLoad(
        original=config,
        config=settled.config,
        settings=settled.settings,
        fixes=settled.fixes,
        translated=(*settled.translated, TYING) if tying_changed else settled.translated,
        module=module,
        row=row,
        reason=reason,
        headers=headers,
        layout=layout,
        plan=None if faults else plan,
        serving=serving,
        faults=tuple(faults),
        needs_row=unsafe,
        max_length=settled.max_length,
        max_length_reason=settled.max_length_reason,
        warnings=tuple(warnings),
    )
    return with_cache_checked(planned)


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
            findings += check_contents(
                headers.folder, headers.tensors, layout.numbers, headers.stored
            )
        if faults := list(faults_of(findings, headers.tensors)):
            return None, faults
        # Several families' sanitize looks for experts in the first layer, which may be absent.
        quantizes = serving.setting != NONE
        plan = make_plan(
            layout,
            row,
            config,
            split=quantizes or bool(headers.absent),
            exact=serving.exact,
            checked=True,
            hold=not quantizes,
            complete=serving.complete or (serving.experts_apart and bool(layout.experts)),
            released=headers.stored is not None,
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
