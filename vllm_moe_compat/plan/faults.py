"""Faults: the reasons for which a load is refused, from every check.

A fault has an id for programs, and the message, the remedy and the exception of a load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.files import FileFault
from vllm_moe_compat.checkpoint.findings import Finding, grouped
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.errors import CheckpointFileError, CompatError, UnsupportedCheckpointError
from vllm_moe_compat.families.modules import OWN_CODE
from vllm_moe_compat.plan import quantization
from vllm_moe_compat.plan.check_unreadable import check_unreadable
from vllm_moe_compat.plan.serving import NONE, Serving

_RANKS = {0: "experts-twice", 1: "experts-gap", 2: "experts-contradict", 3: "experts-unlike"}
"""``Finding.rank`` of a finding about experts → id of the fault."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that prevents a correct load.

    Attributes:
        id: the kind of fault, for programs.
        message: the file, tensor or setting, the finding and the expectation.
        remedy: the way to repair it.
        error: the exception that a load raises.
        count: number of tensors with the fault.
    """

    id: str
    message: str
    remedy: str
    error: type[CompatError]
    count: int = 1


def faults_of(findings: Iterable[Finding], tensors: Mapping[str, TensorInfo]) -> Iterator[Fault]:
    """Yield one fault for each group of equal findings, the lowest rank first."""
    for first, message, count in grouped(findings, tensors):
        if first.error is UnsupportedCheckpointError:
            id = f"{first.topic}-unsupported"
        else:
            id = _RANKS[first.rank] if first.topic == "experts" else f"{first.topic}-scales"
        yield Fault(id, message, first.remedy, first.error, count)


def already_quantized(
    folder: Path, config: Mapping[str, Any], layout: Layout, serving: Serving, *, extern: bool
) -> Iterator[Fault]:
    """Yield a fault if a checkpoint in a quantised form is to be quantised again."""
    if serving.setting == NONE:
        return
    shown = quantization.sign_of_quantization(config, layout, extern=extern)
    if shown is not None:
        yield Fault(
            "quantized-already",
            f"{folder}: the checkpoint is quantised already ({shown}), where bf16 or "
            "block-FP8 weights were expected",
            f"unset {QUANTIZE.name} to load it as it is",
            UnsupportedCheckpointError,
        )


def stays_packed(folder: Path, layout: Layout, serving: Serving) -> Iterator[Fault]:
    """Yield a fault if weights that MLX holds as they are stored are to be quantised again."""
    if serving.setting == NONE:
        return
    if weights := quantization.weights_that_stay(layout):
        forms = " and ".join(details.words for details in layout.numbers.details)
        yield Fault(
            "quantized-already",
            f"{folder}: {fold(weights)} stay packed as they are stored ({forms}), where weights "
            f"were expected that {QUANTIZE.name} can quantise",
            f"unset {QUANTIZE.name} to load them as they are",
            UnsupportedCheckpointError,
            len(weights),
        )


def unmapped(
    folder: Path,
    layout: Layout,
    config: Mapping[str, Any],
    module: str,
    reason: str,
    serving: Serving,
) -> Iterator[Fault]:
    """Yield the faults of a load by a module that is not wrapped."""
    if reason == OWN_CODE:
        return
    yield from faults_of(check_unreadable(layout, config, None), layout.tensors)
    if serving.setting != NONE:
        yield Fault(
            "quantize-unmapped",
            f"{folder}: {module} cannot be quantised while loading, since {reason}",
            f"unset {QUANTIZE.name}, or quantise the checkpoint with `mlx_lm.convert -q`",
            UnsupportedCheckpointError,
        )
    refused = [
        found
        for found in layout.numbers.found
        # Linear layers of these are read by load_model, whatever the module.
        if layout.experts or not found.form.misread_upstream
    ]
    weights = [name for found in refused for name in (*found.weights, *found.stray())]
    if weights:
        forms = " and ".join(sorted({found.form.title for found in refused}))
        verb = "are" if len(weights) > 1 else "is"
        yield Fault(
            f"{refused[0].form.name}-unmapped",
            f"{layout.weights[weights[0]].file}: {fold(weights)} {verb} {forms}, which {module} "
            f"reads as integers, and it cannot be patched, since {reason}",
            "load a bf16 release of the model instead",
            UnsupportedCheckpointError,
            len(weights),
        )


def needs_row(layout: Layout) -> str:
    """Name the tensors that mlx-lm may not load correctly without a row; empty for none."""
    parts = [
        f"{len(found.weights) + len(found.stray()):,} {found.form.title} weights"
        for found in layout.numbers.found
        if found.weights or found.stray()
    ]
    if layout.per_expert:
        parts.append(f"{len(layout.per_expert):,} per-expert weights")
    return " and ".join(parts)


def of_file(fault: FileFault) -> Fault:
    """Return the fault of a file as a fault of the load."""
    return Fault(fault.id, fault.message, fault.remedy, CheckpointFileError)


def of_error(id: str, error: CompatError) -> Fault:
    """Return an exception as a fault of the load; its message ends with the remedy."""
    message, _, remedy = str(error).removesuffix(".").rpartition("; ")
    return Fault(id, message or remedy, remedy if message else "", type(error))
