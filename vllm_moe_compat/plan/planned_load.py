"""A checkpoint's headers, and the load that is planned from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint import file_stamps
from vllm_moe_compat.checkpoint.file_stamps import FileStamps
from vllm_moe_compat.checkpoint.files import FileFault
from vllm_moe_compat.checkpoint.headers import TensorInfo, scan_headers, weight_files
from vllm_moe_compat.checkpoint.index import read_index
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.families.fixes.fix import ForwardFix
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan import quantization
from vllm_moe_compat.plan.effective_config import Settings, effective_config
from vllm_moe_compat.plan.faults import (
    Fault,
    already_quantized,
    needs_row,
    stays_packed,
    unmapped,
)
from vllm_moe_compat.plan.planner import Plan, make_plan
from vllm_moe_compat.plan.serving import NONE, Serving


@dataclass(frozen=True, slots=True)
class Headers:
    """The headers and the index of a checkpoint, as far as they can be read.

    Attributes:
        folder: the checkpoint's folder.
        tensors: all tensors of the shards.
        index: tensor → file by the index; None without a readable index.
        stamps: what the files were when their headers were read.
        faults: faults of shards and index.
        extern: whether the folder has an ``hf_quant_config.json``.
        absent: names that the index puts into absent files, if only the part that is there is
            loaded (``present_part``); then they are no fault.
        pieces: tensors of layers that are not all there, which such a load leaves out.
        stored: name → name in the files, if ``tensors`` are a part of the files' tensors under
            names that others may have there; None if they are the files'.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    index: Mapping[str, str] | None
    stamps: FileStamps
    faults: tuple[FileFault, ...]
    extern: bool
    absent: frozenset[str] = frozenset()
    pieces: tuple[str, ...] = ()
    stored: Mapping[str, str] | None = None


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

    def plan_for(self, setting: str, *, complete: bool | None = None) -> Plan | None:
        """Return the plan for another quantisation setting; None if it does not apply.

        Args:
            setting: the quantisation setting.
            complete: whether it has a build for every tensor; None for as the load's plan has.
        """
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
            complete=self.plan.complete if complete is None else complete,
            released=self.headers.stored is not None,
        )


def read_headers_of(folder: Path) -> Headers:
    """Read headers and index of a folder; faults are recorded, not raised."""
    faults: list[FileFault] = []
    files = weight_files(folder)
    stamps = file_stamps.take(folder)
    tensors = scan_headers(files, faults.append)
    index = read_index(folder, faults.append)
    extern = (folder / "hf_quant_config.json").exists()
    return Headers(folder, tensors, index, stamps, tuple(faults), extern)
