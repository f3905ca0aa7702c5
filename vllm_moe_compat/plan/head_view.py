"""View a prediction head as a checkpoint of its own, and plan its load.

Its tensors get the names of a model of the target's class with one layer: ``….layers.0.…``. What
joins the embedding and the hidden state is viewed as a part of that layer (``PLACES``), under
names by which ``sanitize`` treats its norms as the layer's own. The config is the target's, cut
to that layer. The view goes down the road of every checkpoint (``plan.make``), so every stored
form, layout of experts and setting comes out as in the target.

The embeddings and the output head of most heads are copies of the target's, and are then left
out. Where their first ``COMPARED`` bytes differ, the head's own are loaded: what a head drafts is
verified, so a difference further on costs a draft and not an answer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.checkpoint.same_bytes import same_bytes
from vllm_moe_compat.families.prediction_heads import (
    EMBEDDING,
    EMBEDDING_NORM,
    HIDDEN_NORM,
    JOIN,
    NORM,
    OUTPUT,
    PER_LAYER,
    PredictionHead,
)
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan import quantization
from vllm_moe_compat.plan.check_heads import INSIDE, check_layers, check_parts
from vllm_moe_compat.plan.effective_config import text_section
from vllm_moe_compat.plan.faults import Fault
from vllm_moe_compat.plan.head_names import HeadNames
from vllm_moe_compat.plan.make import make
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.serving import NONE

COMPARED = 16 * 2**20
"""Bytes of embeddings and output head that are compared with the target's."""
PLACES = {
    JOIN: f"{INSIDE}.join",
    EMBEDDING_NORM: f"{INSIDE}.embedding.input_layernorm",
    HIDDEN_NORM: f"{INSIDE}.hidden.input_layernorm",
}
"""Part of a head → its module in the view's decoder layer."""
_NUMBER = re.compile(r"\.\d+(?=\.)")


def view_head(
    planned: PlannedLoad, row: Row, facts: PredictionHead, names: HeadNames, count: int
) -> tuple[PlannedLoad, list[Fault]]:
    """Return the planned load of the first head, and what prevents it."""
    root = _root(planned, row)
    faults = list(check_parts(planned, names))
    own = {part for part in (EMBEDDING, OUTPUT) if _differs(planned, row, names, part)}
    layer = f"{root}layers." if facts.layers > 1 else f"{root}layers.0."
    renamed = {
        name: f"{layer}{_inside(name.removeprefix(names.layer), facts)}" for name in names.inside
    }
    places = {part: f"{root}layers.0.{place}" for part, place in PLACES.items()}
    places[NORM] = f"{root}{facts.final_norm}"
    places[EMBEDDING] = f"{root}{row.embedding}"
    places[OUTPUT] = next(iter(_stems(planned, "lm_head")), "lm_head")
    for part, every in names.apart.items():
        if part in (EMBEDDING, OUTPUT) and part not in own:
            continue
        for name in every:
            renamed[name] = places[part] + name.removeprefix(names.parts[part])
    tensors = {new: planned.headers.tensors[old] for old, new in renamed.items()}
    experts = any(".experts." in name for name in names.inside)
    inside = {
        _inside(name.removeprefix(names.layer), facts): planned.headers.tensors[name]
        for name in names.inside
    }
    config = _one_layer(planned, facts, count, inside, experts=experts, untied=OUTPUT in own)
    _rename_modules(config, names, renamed)
    of_files = {new: old for old, new in planned.plan.names.renamed} if planned.plan else {}
    headers = replace(
        planned.headers,
        tensors=tensors,
        index=None,
        faults=(),
        absent=frozenset(),
        pieces=(),
        stored={new: of_files.get(old, old) for old, new in renamed.items()},
    )
    view = make(
        headers, config, replace(planned.serving, complete=True, experts_apart=False, ranks=1)
    )
    faults += [
        replace(fault, message=fault.message.replace(layer, names.layer)) for fault in view.faults
    ]
    if view.plan is None or view.layout is None:
        return view, faults
    if not view.layout.numbers.found and view.serving.setting == NONE:
        # The target's form is not the head's.
        quantization.mark_dequantized(view.config)
    faults += check_layers(planned, view, facts, names, layer)
    again = dict(view.plan.names.renamed)
    composed = replace(
        view.plan.names,
        renamed=tuple(
            (of_files.get(old, old), again.get(new, new)) for old, new in renamed.items()
        ),
        words=(),
        alone=True,
    )
    return replace(view, plan=replace(view.plan, names=composed)), faults


def _root(planned: PlannedLoad, row: Row) -> str:
    """Return what precedes the target's decoder layers."""
    assert planned.layout is not None, "it was checked"
    for name in planned.layout.tensors:
        layer = layer_of(name)
        if layer is not None:
            root = layer.prefix.removesuffix("layers.")
            if root in row.roots:
                return root
    return row.roots[0] if row.roots else "model."


def _inside(name: str, facts: PredictionHead) -> str:
    for old, new in facts.renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _stems(planned: PlannedLoad, last: str) -> dict[str, list[str]]:
    """Return the target's modules of this name outside of layers, with their tensors' endings."""
    assert planned.layout is not None, "it was checked"
    found: dict[str, list[str]] = {}
    for name in planned.layout.tensors:
        stem, _, end = name.rpartition(".")
        if stem.rpartition(".")[2] == last and layer_of(name) is None:
            found.setdefault(stem, []).append(end)
    return found


def _differs(planned: PlannedLoad, row: Row, names: HeadNames, part: str) -> bool:
    """Whether the head has embeddings or an output head that are not the target's."""
    mine = names.apart.get(part, ())
    if not mine:
        return False
    targets = _stems(planned, row.embedding)
    if part == OUTPUT:
        targets = _stems(planned, "lm_head") or targets
    ends = sorted(name.removeprefix(names.parts[part] + ".") for name in mine)
    for stem, theirs in targets.items():
        if sorted(theirs) == ends:
            return not all(
                _same(planned, f"{names.parts[part]}.{end}", f"{stem}.{end}") for end in ends
            )
    return True


def _same(planned: PlannedLoad, one: str, other: str) -> bool:
    tensors = planned.headers.tensors
    renamed = {} if planned.plan is None else {new: n for n, new in planned.plan.names.renamed}
    in_files = {renamed.get(name, name): tensors[name] for name in (one, other)}
    first, second = (renamed.get(name, name) for name in (one, other))
    return same_bytes(planned.headers.folder, in_files, first, second, most=COMPARED)


def _one_layer(
    planned: PlannedLoad,
    facts: PredictionHead,
    count: int,
    inside: Mapping[str, TensorInfo],
    *,
    experts: bool,
    untied: bool,
) -> dict[str, Any]:
    """Return the config of a model of the head's layer alone, whose tensors are ``inside``."""
    config: dict[str, Any] = copy.deepcopy(dict(planned.original))
    text = text_section(config)
    kind = "sparse" if experts else "dense"
    like = _layer_like(planned, inside)
    for key in PER_LAYER:
        value, own = text.get(key), text.get(f"mtp_{key}")
        if value is None:
            value = planned.settings.get(key)  # What the class makes of other settings.
        if isinstance(own, list) and own:
            # K-EXAONE 2.0 says of its heads what it says of its layers.
            text[key] = own[: facts.layers]
        elif isinstance(value, list) and len(value) >= count:
            text[key] = [value[count] if len(value) > count else value[like]]
    by_layer = text.get("per_layer_config")
    if isinstance(by_layer, dict):
        own = by_layer.get(str(count), by_layer.get(str(like)))
        text["per_layer_config"] = {} if own is None else {"0": own}
    windows = text.get("mtp_sliding_windows")
    if isinstance(windows, list) and windows and windows[0]:
        text["sliding_window"] = windows[0]
    wanted = {**facts.always, **(facts.sparse if kind == "sparse" else facts.dense)}
    known = {*text, *planned.settings}
    text.update({key: copy.deepcopy(value) for key, value in wanted.items() if key in known})
    for key in ("num_hidden_layers", "num_layers"):
        if key in known:
            text[key] = facts.layers + facts.spare
    if untied:
        for section in (config, text):
            section["tie_word_embeddings"] = False
    return config


def _layer_like(planned: PlannedLoad, inside: Mapping[str, TensorInfo]) -> int:
    """Return the number of the target's first layer that has the most tensors of the head's."""
    assert planned.layout is not None, "it was checked"
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, info in planned.layout.tensors.items():
        if (layer := layer_of(name)) is not None:
            rest = _NUMBER.sub(".", name.removeprefix(layer.path))
            layers.setdefault(layer.number, {})[rest] = info.shape
    head = {_NUMBER.sub(".", f".{name}"): info.shape for name, info in inside.items()}

    def likeness(number: int) -> tuple[int, int, int]:
        mine = layers[number]
        same = len(mine.items() & head.items()), len(mine.keys() & head.keys())
        return (*same, -number)

    return max(layers, key=likeness, default=0)


def _rename_modules(config: dict[str, Any], names: HeadNames, renamed: Mapping[str, str]) -> None:
    """Write names of the head's modules in ``quantization_config`` as the view has them."""
    modules = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in renamed.items()}
    layer = next((n.split(INSIDE)[0] for n in renamed.values() if INSIDE in n), "")

    def of(entry: Any) -> Any:
        if not isinstance(entry, str):
            return entry
        if entry in modules:
            return modules[entry]
        if names.layer and f"{entry}.".startswith(names.layer):
            return layer + f"{entry}."[len(names.layer) :].rstrip(".")
        return None if layer_of(entry) is not None and entry[:3] != "re:" else entry

    for section in (config, text_section(config)):
        settings: dict[str, Any] | None = section.get("quantization_config")
        if not isinstance(settings, dict):
            continue
        for key, value in settings.items():
            if isinstance(value, list):
                changed = [of(entry) for entry in value]
                settings[key] = [entry for entry in changed if entry is not None]
