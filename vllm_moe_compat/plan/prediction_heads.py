"""Plan the load of a checkpoint's multi-token-prediction head, as of a model of its own.

The head's decoder layer is of the target's kind. So its tensors are *viewed* as those of a model
of the target's class with one layer: renamed to ``….layers.0.…``, beside a config of one layer.
The view goes down the road of every checkpoint (``plan.make``), and every stored form, layout of
experts and setting comes out as in the target. What joins the embedding and the hidden state is
viewed as a part of that layer (``PLACES``), under names by which ``sanitize`` treats its norms as
the layer's own.

Only the first of several heads is used. A head is checked against the target's layers, whose
tensors it must have, so it is known from headers alone whether it can be used.

The embeddings and the output head of most heads are copies of the target's, and are then left
out. Where their first ``COMPARED`` bytes differ, the head's own are loaded: what a head drafts is
verified, so a difference further on costs a draft and not an answer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_moe_compat.checkpoint.config import (
    layer_count,
    quantization_configs,
    sections,
    whole_number,
)
from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.checkpoint.findings import refuse
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.names import fold, layer_of
from vllm_moe_compat.checkpoint.same_bytes import same_bytes
from vllm_moe_compat.dtypes import STORED_NAMES, nbytes
from vllm_moe_compat.errors import LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.families.prediction_heads import (
    COUNT_KEYS,
    EMBEDDING,
    EMBEDDING_NORM,
    HEADS_BY_MODULE,
    HIDDEN_NORM,
    JOIN,
    NORM,
    OUTPUT,
    PER_LAYER,
    PredictionHead,
)
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan import quantization
from vllm_moe_compat.plan.effective_config import text_section
from vllm_moe_compat.plan.estimate import estimate
from vllm_moe_compat.plan.faults import Fault
from vllm_moe_compat.plan.make import make
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.planner import make_plan
from vllm_moe_compat.plan.serving import NONE

COMPARED = 16 * 2**20
"""Bytes of embeddings and output head that are compared with the target's."""
INSIDE = "prediction_head"
PLACES = {
    JOIN: f"{INSIDE}.join",
    EMBEDDING_NORM: f"{INSIDE}.embedding.input_layernorm",
    HIDDEN_NORM: f"{INSIDE}.hidden.input_layernorm",
}
"""Part of a head → its module in the view's decoder layer."""
WITHOUT = "use --speculative-config without mtp"
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class FoundHeads:
    """The prediction heads of a checkpoint.

    Attributes:
        stated: their number by the config; None if it says nothing.
        tensors: name → tensor of all heads.
        facts: how the family's heads are stored; None for an unknown family.
        view: the planned load of the first head; None if it cannot be used.
        faults: why it cannot be used.
    """

    stated: int | None
    tensors: Mapping[str, TensorInfo]
    facts: PredictionHead | None = None
    view: PlannedLoad | None = None
    faults: tuple[Fault, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all heads in the files."""
        return sum(nbytes(info.dtype, info.shape) for info in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the first head's weights once it is loaded; 0 if it cannot be used."""
        if self.view is None or self.view.plan is None or self.view.layout is None:
            return 0
        serving = self.view.serving
        needs = estimate(
            self.view.plan,
            self.view.layout.tensors,
            STORED_NAMES[serving.dtype],
            STORED_NAMES[serving.packed_dtype],
            {serving.setting: self.view.spared(serving.setting)},
        )
        return needs.final[serving.setting]

    def usable(self) -> PlannedLoad:
        """Return the planned load of the first head.

        Raises:
            CompatError: it cannot be used.
        """
        if self.view is None:
            first, *others = self.faults
            rest = sum(fault.count for fault in others)
            more = f" (and {rest} more fault{'s' if rest > 1 else ''})" if rest else ""
            remedy = f"{first.remedy}, or {WITHOUT}" if first.remedy else WITHOUT
            raise first.error(
                f"the prediction head cannot be used: {first.message}{more}; {remedy}."
            )
        return self.view


def find_heads(planned: PlannedLoad) -> FoundHeads:
    """Find a checkpoint's prediction heads, and plan the load of the first one.

    Args:
        planned: the target's load, without faults.
    """
    stated = next(
        (
            section[key]
            for section in sections(planned.original)
            for key in COUNT_KEYS
            if type(section.get(key)) is int
        ),
        None,
    )
    name = planned.module.rpartition(".")[2]
    facts = HEADS_BY_MODULE.get(name)
    if planned.row is None or planned.layout is None or planned.plan is None:
        fault = _fault("heads-unknown", f"{name or 'the model'} has no row in the registry")
        return FoundHeads(stated, {}, faults=(fault,))
    try:
        return _find(planned, planned.row, facts, stated)
    except (LayoutError, UnsupportedCheckpointError) as error:
        message = str(error).rstrip(".")
        fault = Fault("heads-incomplete", message, _AGAIN, type(error))
        return FoundHeads(stated, _unknown_heads(planned), facts, faults=(fault,))


def _find(
    planned: PlannedLoad, row: Row, facts: PredictionHead | None, stated: int | None
) -> FoundHeads:
    config = planned.config
    count = layer_count(config) or 0
    others = _unknown_heads(planned)
    if facts is None:
        return FoundHeads(stated, others, faults=(_unknown(planned, others, stated),))
    names = _names(planned, row, facts, count)
    if names is None:
        absent = _unknown(planned, others, stated) if others else _absent(planned, stated)
        return FoundHeads(stated, others, facts, faults=(absent,))
    tensors = {**others, **{n: planned.headers.tensors[n] for n in names.every}}
    if _is_mlx(planned):
        fault = _fault(
            "heads-unknown",
            f"{fold(names.every)} are in a folder that mlx-lm or this package has converted, where "
            "no head was expected, since converting leaves heads out; so it is not known what "
            "they were made of",
            "serve the release that the folder was made from",
        )
        return FoundHeads(stated, tensors, facts, faults=(fault,))
    view, faults = _view(planned, row, facts, names, count)
    return FoundHeads(stated, tensors, facts, None if faults else view, tuple(faults))


@dataclass(frozen=True, slots=True)
class _Names:
    """The names of a checkpoint's heads.

    Attributes:
        layer: beginning of the names in the first head's decoder layer.
        parts: part → name of its module.
        inside: the first head's tensors in the decoder layer.
        apart: part → its tensors.
        strange: tensors of the first head that are neither.
        every: all tensors of all heads.
    """

    layer: str
    parts: Mapping[str, str]
    inside: tuple[str, ...]
    apart: Mapping[str, tuple[str, ...]]
    strange: tuple[str, ...]
    every: tuple[str, ...]


def _names(planned: PlannedLoad, row: Row, facts: PredictionHead, count: int) -> _Names | None:
    """Return the names of the heads; None if there is none."""
    tensors = planned.headers.tensors
    for root in dict.fromkeys(("", *row.roots, "model.", "language_model.")):
        at = {"root": root, "index": 0, "number": count}
        layer, own = facts.layer.format(**at), facts.own.format(**at)
        parts = {part: module.format(**at) for part, module in facts.parts.items()}
        beginnings = (*(f"{module}." for module in parts.values()), layer, *([own] if own else []))
        first = [name for name in tensors if name.startswith(tuple(beginnings))]
        if not first:
            continue
        rest = _further_heads(tensors, root, facts, count)
        first = [name for name in first if name not in rest]
        apart = {
            part: tuple(name for name in first if name.startswith(f"{module}."))
            for part, module in parts.items()
        }
        taken = {name for names in apart.values() for name in names}
        inside = tuple(n for n in first if n.startswith(layer) and n not in taken)
        strange = tuple(n for n in first if n not in taken and not n.startswith(layer))
        return _Names(layer, parts, inside, apart, strange, (*first, *sorted(rest)))
    return None


def _further_heads(
    tensors: Mapping[str, TensorInfo], root: str, facts: PredictionHead, count: int
) -> set[str]:
    """Return the names of the heads after the first."""
    found: set[str] = set()
    for index in range(1, 64):
        at = {"root": root, "index": index, "number": count + index}
        begin = tuple(
            text.format(**at)
            for text in (facts.layer, *(f"{module}." for module in facts.parts.values()))
            if "{index}" in text or "{number}" in text
        )
        here = {name for name in tensors if begin and name.startswith(begin)}
        if not here:
            break
        found |= here
    return found


def _unknown_heads(planned: PlannedLoad) -> dict[str, TensorInfo]:
    """Return the tensors that look like those of heads, by names alone."""
    count = layer_count(planned.config)
    roots = () if planned.row is None else planned.row.roots

    def is_head(name: str) -> bool:
        layer = layer_of(name)
        beyond = (
            layer is not None
            and count is not None
            and layer.number >= count
            and layer.prefix.removesuffix("layers.") in roots
        )
        return beyond or "mtp" in name.lower() or "nextn" in name.lower()

    return {name: info for name, info in planned.headers.tensors.items() if is_head(name)}


def _is_mlx(planned: PlannedLoad) -> bool:
    """Whether the folder is in MLX's form, which no release with heads has."""
    moe = None if planned.row is None else planned.row.moe
    stacked = f".{moe.target}." if moe is not None and "switch" in moe.target else None
    assert planned.layout is not None, "it was checked"
    return isinstance(planned.original.get("quantization"), Mapping) or any(
        (name.endswith(".weight") and info.dtype == "U32")
        or (stacked is not None and stacked in name)
        for name, info in planned.layout.tensors.items()
    )


def _fault(id: str, message: str, remedy: str = "", count: int = 1) -> Fault:
    return Fault(id, message, remedy, UnsupportedCheckpointError, count)


def _unknown(planned: PlannedLoad, others: Mapping[str, TensorInfo], stated: int | None) -> Fault:
    if not others:
        return _absent(planned, stated)
    known = ", ".join(HEADS_BY_MODULE)
    return _fault(
        "heads-unknown",
        f"{planned.headers.folder}: the prediction heads of {planned.module} ({fold(others)}) are "
        f"not known here, where those of one of {known} were expected",
    )


def _absent(planned: PlannedLoad, stated: int | None) -> Fault:
    says = f"though config.json says that there {'is' if stated == 1 else 'are'} {stated}"
    return _fault(
        "heads-absent",
        f"{planned.headers.folder}: the checkpoint has no tensors of a prediction head"
        + (f", {says}" if stated else "")
        + (", and a folder in MLX's form never has" if _is_mlx(planned) else ""),
        "serve a release that has them",
    )


def _view(
    planned: PlannedLoad, row: Row, facts: PredictionHead, names: _Names, count: int
) -> tuple[PlannedLoad, list[Fault]]:
    """Return the planned load of the first head, and what prevents it."""
    root = _root(planned, row)
    faults = list(_check_parts(planned, names))
    own = {part for part in (EMBEDDING, OUTPUT) if _differs(planned, row, names, part)}
    renamed = {
        name: f"{root}layers.0.{_inside(name.removeprefix(names.layer), facts)}"
        for name in names.inside
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
    config = _one_layer(planned, facts, count, experts=experts, untied=OUTPUT in own)
    _rename_modules(config, names, renamed)
    headers = replace(
        planned.headers,
        tensors=tensors,
        index=None,
        faults=(),
        absent=frozenset(),
        pieces=(),
    )
    view = make(headers, config, replace(planned.serving, experts_apart=False, ranks=1))
    faults += [
        replace(fault, message=fault.message.replace(f"{root}layers.0.", names.layer))
        for fault in view.faults
    ]
    if view.plan is None or view.layout is None:
        return view, faults
    if not view.layout.numbers.found and view.serving.setting == NONE:
        # The target's form is not the head's.
        quantization.mark_dequantized(view.config)
    if not faults:
        faults += _compare(planned, view, row, facts, names, f"{root}layers.0.")
    of_files = {new: old for old, new in planned.plan.names.renamed} if planned.plan else {}
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


def _check_parts(planned: PlannedLoad, names: _Names) -> Iterator[Fault]:
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
        weights = detect(given, planned.config, Extras()).weights
        found = weights.get(f"{module}.weight")
        if extra := sorted(weights.keys() - {f"{module}.weight"}):
            yield _strange_names(extra)
        if found is None or found.shape != shapes[part]:
            has = "is missing" if found is None else f"is {list(found.shape)}"
            yield _incomplete(f"{file}: {module}.weight {has}, where {list(shapes[part])} was")
    if not names.inside:
        yield _incomplete(f"{names.layer}… is missing, where a decoder layer's tensors were")
    if names.strange:
        yield _strange_names(names.strange)


def _incomplete(message: str, count: int = 1) -> Fault:
    return Fault(
        "heads-incomplete",
        f"{message} expected for the prediction head",
        _AGAIN,
        LayoutError,
        count,
    )


def _differs(planned: PlannedLoad, row: Row, names: _Names, part: str) -> bool:
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
    planned: PlannedLoad, facts: PredictionHead, count: int, *, experts: bool, untied: bool
) -> dict[str, Any]:
    """Return the config of a model of the head's layer alone."""
    config: dict[str, Any] = copy.deepcopy(dict(planned.original))
    text = text_section(config)
    kind = "sparse" if experts else "dense"
    like = _first_layer_with(planned, experts=experts)
    for key in PER_LAYER:
        value = text.get(key)
        if isinstance(value, list) and len(value) >= count:
            text[key] = [value[count] if len(value) > count else value[like]]
    wanted = {**facts.always, **(facts.sparse if kind == "sparse" else facts.dense)}
    known = {*text, *planned.settings, *text_section(planned.config)}
    text.update({key: copy.deepcopy(value) for key, value in wanted.items() if key in known})
    for key in ("num_hidden_layers", "num_layers"):
        if key in known:
            text[key] = 1 + facts.spare
    if untied:
        for section in (config, text):
            section["tie_word_embeddings"] = False
    return config


def _first_layer_with(planned: PlannedLoad, *, experts: bool) -> int:
    """Return the number of the target's first layer with, or without, routed experts."""
    assert planned.layout is not None, "it was checked"
    sparse = {layer.number for b in planned.layout.experts if (layer := layer_of(b.path))}
    every = {layer.number for n in planned.layout.tensors if (layer := layer_of(n))}
    return min(sparse if experts else every - sparse, default=0)


def _rename_modules(config: dict[str, Any], names: _Names, renamed: Mapping[str, str]) -> None:
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


def _compare(
    planned: PlannedLoad,
    view: PlannedLoad,
    row: Row,
    facts: PredictionHead,
    names: _Names,
    layer: str,
) -> Iterator[Fault]:
    """Yield what the head lacks, or has otherwise, beside the target's layers."""
    made = _made(view).get(0, {})
    head = {name: shape for name, shape in made.items() if not name.startswith(INSIDE)}
    target = list(_made(planned).values())
    parts: dict[str, list[dict[str, tuple[int, ...]]]] = {}
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
            yield _strange_names([names.layer + name for name in sorted(given)])
            continue
        expected = max(
            candidates,
            key=lambda c: (len(c.items() & given.items()), len(c.keys() & given.keys()), -len(c)),
        )
        if missing := sorted(expected.keys() - given.keys()):
            listed = fold(names.layer + name for name in missing)
            verb = "is" if len(missing) == 1 else "are"
            yield Fault(
                "heads-incomplete",
                f"{planned.headers.folder}: {listed} {verb} missing, which the target's layers "
                "have",
                _AGAIN,
                LayoutError,
                len(missing),
            )
        if extra := given.keys() - expected.keys():
            yield _strange_names([names.layer + name for name in sorted(extra)])
        for name in sorted(expected.keys() & given.keys()):
            if expected[name] != given[name]:
                yield Fault(
                    "heads-incomplete",
                    f"{_file(view, layer + name)}{names.layer}{name} is {list(given[name])}, "
                    f"where {list(expected[name])} was expected, as in the target's layers",
                    _AGAIN,
                    LayoutError,
                )


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


def _by_part(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        found.setdefault(name.partition(".")[0], {})[name] = shape
    return found


_NUMBER = re.compile(r"\.\d+\.")


def _made(planned: PlannedLoad) -> dict[int, dict[str, tuple[int, ...]]]:
    """Return the tensors that a load makes of each kind of layer, in floats.

    Returns:
        Number of a layer → name in the layer → shape. Layers whose tensors are alike are there
        once.
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
    # The plan has replaced the settings of the stored numbers.
    stored = quantization_configs(planned.original)
    config = {**planned.config, "quantization_config": stored[0] if stored else None}
    layout = detect(kept, config, Extras())
    refuse(layout.numbers.findings(), layout.tensors)
    plan = make_plan(layout, planned.row, config, checked=True, complete=True)
    shapes = {
        name: spec.shape
        for build in plan.builds
        for name, spec in zip(build.targets, build.results(layout.tensors, "BF16"), strict=True)
    }
    shapes |= {name: layout.tensors[name].shape for name in plan.widen}
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape_ in shapes.items():
        if (layer := layer_of(name)) is not None:
            found.setdefault(layer.number, {})[name[_after(name) :]] = tuple(shape_)
    return found


def _after(name: str) -> int:
    layer = layer_of(name)
    assert layer is not None, "it is in a layer"
    return len(layer.path) + 1
