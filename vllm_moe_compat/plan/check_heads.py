"""Check a prediction head against the target's layers, by headers alone.

A load makes the same tensors of a head's layer as of a layer of the target of the same kind. So
the head's plan is compared with the target's, whatever the layout of their experts and the form
of their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs, whole_number
from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.checkpoint.findings import refuse
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.names import fold, layer_of
from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.dtypes import FLOATS
from vllm_moe_compat.errors import LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.families.prediction_heads import (
    EMBEDDING,
    EMBEDDING_NORM,
    HIDDEN_NORM,
    JOIN,
    NORM,
    OUTPUT,
    PredictionHead,
)
from vllm_moe_compat.plan.faults import Fault
from vllm_moe_compat.plan.head_names import HeadNames
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.planner import make_plan

INSIDE = "prediction_head"
"""Module of what joins embedding and hidden state, in the view's decoder layer."""
AGAIN = "download the checkpoint again"


def check_parts(planned: PlannedLoad, names: HeadNames) -> Iterator[Fault]:
    """Yield parts that are missing, have another shape than they need, or are not known."""
    width = whole_number(planned.config, "hidden_size") or 0
    words = whole_number(planned.config, "vocab_size") or 0
    shapes = {
        JOIN: (width, 2 * width),
        EMBEDDING_NORM: (width,),
        HIDDEN_NORM: (width,),
        NORM: (width,),
        EMBEDDING: (words, width),
        OUTPUT: (words, width),
    }
    for part, module in names.parts.items():
        if not names.apart[part]:
            if part not in (EMBEDDING, OUTPUT):
                yield _incomplete(f"{module}.weight is missing, where {list(shapes[part])} was")
            continue
        given = {n: planned.headers.tensors[n] for n in names.apart[part]}
        file = next(iter(given.values())).file
        layout, name = detect(given, _config(planned), Extras()), f"{module}.weight"
        found = layout.weights.get(name)
        if extra := sorted(layout.weights.keys() - {name}):
            yield _strange_names(extra)
        known = found is not None and (name in layout.numbers.weights or found.dtype in FLOATS)
        if found is None or found.shape != shapes[part] or not known:
            has = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
            yield _incomplete(f"{file}: {module}.weight {has}, where {list(shapes[part])} was")
    if not names.inside:
        yield _incomplete(f"{names.layer}… is missing, where a decoder layer's tensors were")
    if names.strange:
        yield _strange_names(names.strange)


def _incomplete(message: str, count: int = 1) -> Fault:
    return Fault(
        "heads-incomplete",
        f"{message} expected for the prediction head",
        AGAIN,
        LayoutError,
        count,
    )


def check_layers(
    planned: PlannedLoad,
    view: PlannedLoad,
    facts: PredictionHead,
    names: HeadNames,
    layer: str,
) -> Iterator[Fault]:
    """Yield what the head lacks, or has otherwise, beside the target's layers."""
    made, target = _made(view), list(_made(planned).values())
    if facts.layers == 1:
        yield from _check_layer(planned, view, facts, made.get(0, {}), target, names.layer, layer)
        return
    for number in range(facts.layers):
        at = (f"{names.layer}{number}.", f"{layer}{number}.")
        yield from _check_layer(planned, view, facts, made.get(number, {}), target, *at)
    if surplus := [f"{names.layer}{n}" for n in sorted(made) if n >= facts.layers]:
        yield _strange_names(surplus)


def _check_layer(
    planned: PlannedLoad,
    view: PlannedLoad,
    facts: PredictionHead,
    made: Mapping[str, Spec],
    target: Sequence[Mapping[str, Spec]],
    stored: str,
    layer: str,
) -> Iterator[Fault]:
    """Yield the same of one layer, which is ``stored`` under one name and viewed as ``layer``."""
    head = {name: shape for name, shape in made.items() if not name.startswith(INSIDE)}
    parts: dict[str, list[dict[str, Spec]]] = {}
    for one in target:
        for part, tensors in _by_part(one).items():
            if tensors not in parts.setdefault(part, []):
                parts[part].append(tensors)
    common = {
        facts.attention,
        *(part for part in parts if all(part in _by_part(o) for o in target)),
    }
    mine = _by_part(head)
    for part in sorted(common | mine.keys()):
        given = mine.get(part, {})
        candidates = parts.get(part)
        if candidates is None:
            yield _strange_names([stored + name for name in sorted(given)])
            continue
        expected = max(
            candidates,
            key=lambda c: (len(c.items() & given.items()), len(c.keys() & given.keys()), -len(c)),
        )
        if missing := sorted(expected.keys() - given.keys()):
            listed = fold(stored + name for name in missing)
            verb = "is" if len(missing) == 1 else "are"
            yield Fault(
                "heads-incomplete",
                f"{planned.headers.folder}: {listed} {verb} missing, which the target's layers "
                "have",
                AGAIN,
                LayoutError,
                len(missing),
            )
        if extra := given.keys() - expected.keys():
            yield _strange_names([stored + name for name in sorted(extra)])
        for name in sorted(expected.keys() & given.keys()):
            if expected[name] != given[name]:
                yield Fault(
                    "heads-incomplete",
                    f"{_file(view, layer + name)}{stored}{name} is {_words(given[name])}, where "
                    f"{_words(expected[name])} was expected, as in the target's layers",
                    AGAIN,
                    LayoutError,
                )


def _words(spec: Spec) -> str:
    return f"{'' if spec.dtype == _FLOAT else f'{spec.dtype} '}{list(spec.shape)}"


def _file(view: PlannedLoad, name: str) -> str:
    info = view.headers.tensors.get(name)
    return f"{info.file}: " if info is not None and info.file else ""


def _strange_names(found: Sequence[str]) -> Fault:
    return Fault(
        "heads-unknown",
        f"{fold(found)} {'is' if len(found) == 1 else 'are'} not known as a part of a prediction "
        "head, where the tensors of a layer of the target, the norms and the joining projection "
        "were expected",
        "",
        UnsupportedCheckpointError,
        len(found),
    )


def _by_part(tensors: Mapping[str, Spec]) -> dict[str, dict[str, Spec]]:
    found: dict[str, dict[str, Spec]] = {}
    for name, shape in tensors.items():
        found.setdefault(name.partition(".")[0], {})[name] = shape
    return found


_FLOAT = "BF16"
_NUMBER = re.compile(r"\.\d+\.")


def _made(planned: PlannedLoad) -> dict[int, dict[str, Spec]]:
    """Return the tensors that a load makes of each kind of layer, in floats.

    Returns:
        Number of a layer → name in the layer → dtype, all floats being ``_FLOAT``, and shape.
        Layers whose tensors are alike are there once.
    """
    assert planned.layout is not None, "it was checked"
    assert planned.row is not None, "it was checked"
    kinds: dict[frozenset[tuple[str, TensorInfo]], tuple[int, list[str]]] = {}
    layers: dict[int, list[str]] = {}
    for name in planned.layout.tensors:
        if (layer := layer_of(name)) is not None:
            layers.setdefault(layer.number, []).append(name)
    for number, members in layers.items():
        shape = frozenset(
            (_NUMBER.sub(".", n[_after(n) :]), replace(planned.layout.tensors[n], file=""))
            for n in members
        )
        kinds.setdefault(shape, (number, members))
    kept = {name: planned.layout.tensors[name] for _, names in kinds.values() for name in names}
    config = _config(planned)
    layout = detect(kept, config, Extras())
    refuse(layout.numbers.findings(), layout.tensors)
    plan = make_plan(layout, planned.row, config, checked=True, complete=True)
    specs: dict[str, Spec | TensorInfo] = {
        name: spec
        for build in plan.builds
        for name, spec in zip(build.targets, build.results(layout.tensors, _FLOAT), strict=True)
    }
    specs |= {name: layout.tensors[name] for name in plan.widen}
    found: dict[int, dict[str, Spec]] = {}
    for name, spec in specs.items():
        if (layer := layer_of(name)) is not None:
            dtype = _FLOAT if spec.dtype in FLOATS else spec.dtype
            found.setdefault(layer.number, {})[name[_after(name) :]] = Spec(dtype, spec.shape)
    return found


def _config(planned: PlannedLoad) -> dict[str, Any]:
    """Return the effective config with the settings of stored numbers, which a plan replaces."""
    stored = quantization_configs(planned.original)
    return {**planned.config, "quantization_config": stored[0] if stored else None}


def _after(name: str) -> int:
    layer = layer_of(name)
    assert layer is not None, "it is in a layer"
    return len(layer.path) + 1
