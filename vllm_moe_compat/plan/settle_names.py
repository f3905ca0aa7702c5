"""Settle the names of a checkpoint's tensors, its output head and its index, for a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.adapters import MERGE, adapter_file
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.index import STALE, contradictions
from vllm_moe_compat.checkpoint.layout import Layout, detect
from vllm_moe_compat.checkpoint.names import fold, layer_of
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families import modules
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.faults import Fault, of_file
from vllm_moe_compat.plan.heads import Heads, apply_tying, settle_heads
from vllm_moe_compat.plan.planned_load import Headers
from vllm_moe_compat.plan.tensor_names import (
    TensorNames,
    uniform_names,
    unknown_names,
    unmerged,
)


@dataclass(frozen=True, slots=True)
class SettledNames:
    """Tensors under the names that the plan goes by.

    Attributes:
        headers: the headers, renamed.
        names: the changes of names.
        layout: the layout of the renamed tensors.
        tying_changed: whether the config's tying was changed.
        faults: faults of names, head and index.
        warnings: what a user should know of them.
    """

    headers: Headers
    names: TensorNames
    layout: Layout
    tying_changed: bool
    faults: list[Fault]
    warnings: list[Fault]


def settle_names(headers: Headers, row: Row, config: dict[str, Any], *, tied: Any) -> SettledNames:
    """Settle names, output head and index.

    Args:
        headers: the checkpoint's headers.
        row: the module's row.
        config: the effective config; its tying is changed where the tensors decide.
        tied: the setting ``tie_word_embeddings`` of the whole model.

    Raises:
        LayoutError: a number in the config is not valid.
    """
    faults, warnings = _index_faults(headers, config, row)
    tensors = headers.tensors
    names = uniform_names(tensors, row, row.ignored.of(config))
    heads = Heads()
    if all(layer_of(name) is not None for name in headers.absent):
        heads = settle_heads(headers.folder, names.of(tensors), tensors, config, row, tied=tied)
    changed = apply_tying(config, heads.tie)
    names = _with_heads(names, heads, tensors)
    if headers.absent:
        names = _without_pieces(names, headers)
    headers = replace(headers, tensors=names.of(tensors))
    layout = detect(headers.tensors, config, row.ignored)
    foreign = [*unmerged(layout.tensors)] or [
        *unknown_names(layout.tensors, row, modules.mlx_lm().words_of(row))
    ]
    faults += foreign or heads.faults
    warnings += heads.warnings
    return SettledNames(headers, names, layout, bool(changed), faults, warnings)


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


def adapters_beside(folder: Path) -> Iterator[Fault]:
    """Yield a warning if an adapter lies beside the weights."""
    name = adapter_file(folder)
    if name is not None:
        yield Fault(
            "adapter-beside",
            f"{name}: an adapter lies beside the model's weights and is not applied",
            f"nothing has to be done if the model alone is wanted; else {MERGE}",
            UnsupportedCheckpointError,
        )


def _without_pieces(names: TensorNames, headers: Headers) -> TensorNames:
    """Return the changes of names that also leave out pieces of layers."""
    words = [f"{len(headers.absent):,} tensors of the index are in files that are not here"]
    if headers.pieces:
        words.append(f"left out {fold(headers.pieces)}, of layers that are not all here")
    return replace(names, drops=(*names.drops, *headers.pieces), words=(*names.words, *words))


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
