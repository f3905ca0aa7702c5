"""Make ``families/settings_record.json`` from the sweep's files, and see that the two agree.

    python -m settings.record FOLDER [--check]

A value is wrong if a trial that changed it alone gave other logits than transformers, and right
if it was among the settings of a trial that gave the same.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from settings.values import ABSENT, LONG, SIZES
from vllm_moe_compat.families import settings_record
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.settings_record import (
    INERT,
    PUT_IN,
    READ,
    ROPE,
    TRANSLATED,
    Class,
    allows,
    class_of,
)
from vllm_moe_compat.plan.check_settings import reads

Row = dict[str, Any]
Record = dict[str, dict[str, dict[str, Class]]]
FILE = FilePath(settings_record.__file__).with_suffix(".json")
RIGHT = ("moves with", "inert", "weak", "limited")
WRONG = ("silent", "fails", "crashed")
LENGTHS = ("sliding_window", "attention_chunk_size", "max_position_embeddings", "floor_scale")
"""Lengths beyond the sweep's prompts prove nothing."""
LIMITS = re.compile(
    r"swiglu_limits?(_shared)?|time_step_(min|max|limit|floor)|clip_qkv|moe_norm_min"
)
"""Nor do limits that no value reaches."""
BLAMED = ("layer_types", "sliding_window", "n_group", "mlp_layer_types")
"""Settings that a failure of several changes together is put down to, the first that fits."""


@dataclass
class Evidence:
    """What the trials of one setting showed.

    ``usual`` are the values that baselines have, and the config class's default; ``movers`` are
    right, and moved the logits. ``beside`` says that it was changed, right, beside others.
    """

    right: list[Any] = field(default_factory=list)
    wrong: list[Any] = field(default_factory=list)
    usual: list[Any] = field(default_factory=list)
    movers: list[Any] = field(default_factory=list)
    tried: bool = False
    beside: bool = False


def rows_of(folder: FilePath) -> Iterator[Row]:
    """Yield the trials whose config is valid, each with its settings by name."""
    for file in sorted(folder.glob("*.jsonl")):
        around: dict[str, Row] = {}
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if row["outcome"] == "invalid":
                continue
            if not row["setting"]:
                around[row["baseline"]] = row.get("settings", {})
            settings = around[row["baseline"]] | row.get("changed", {})
            yield row | {"settings": settings, "plain": around[""], "family": file.stem}


def record_of(rows: Sequence[Row]) -> Record:
    """Return the class of every setting that was tried.

    Trials of some families alone leave the record of the others' modules as it is.
    """
    found: dict[tuple[str, str], dict[str, Evidence]] = defaultdict(lambda: defaultdict(Evidence))
    for row in rows:
        evidence = found[row["module"], row["kind"]]
        name, value = changed_by(row)
        if row["outcome"] in RIGHT:
            for other, own in row["settings"].items():
                if proves(other, own, row) and own not in evidence[other].right:
                    evidence[other].right.append(own)
        if name:
            evidence[name].tried = True
            if row["outcome"] == "moves with":
                evidence[name].movers.append(value)
            if row["value"] == ABSENT:
                evidence[name].usual.append(value)
            elif row["outcome"] in WRONG and _counts(name, value, row["outcome"]):
                evidence[name].wrong.append(value)
        if not row["setting"] and row["outcome"] in RIGHT:
            for other, own in row["settings"].items():
                evidence[other].usual.append(own)
                if row["plain"].get(other, ABSENT) != own:  # It is changed beside others.
                    evidence[other].beside = True
    for row in (row for row in rows if row["outcome"] in WRONG and not changed_by(row)[0]):
        evidence = found[row["module"], row["kind"]]
        changed = [n for n in BLAMED if row["settings"].get(n) != row["plain"].get(n)]
        for name in [n for n in changed if row["settings"][n] not in evidence[n].right][:1]:
            evidence[name].tried = True
            evidence[name].wrong.append(row["settings"][name])
    record: Record = {}
    for (module, kind), settings in sorted(found.items()):
        tried = {n: e for n, e in settings.items() if e.tried or e.beside or e.usual}
        own = [row for row in rows if (row["module"], row["kind"]) == (module, kind)]
        classes = {n: classify(module, n, e, own) for n, e in tried.items()}
        record.setdefault(module, {})[kind] = _without_repeats(classes)
    return record


def changed_by(row: Row) -> tuple[str, Any]:
    """Return the name and the value of the setting that a trial is about; empty for none."""
    if row["setting"]:
        known = (n for n in row["settings"] if n.partition(" (")[0] == row["setting"])
        name = next(known, row["setting"])
    elif row["baseline"].startswith(ROPE):
        name = f"{row['baseline'].split()[0]}.rope_type"
    else:
        name = row["baseline"] if row["baseline"] in row["settings"] else ""
    return name, row["settings"].get(name)


def classify(module: str, name: str, found: Evidence, rows: Iterable[Row]) -> Class:
    """Return the class of a setting of a module, by what its trials showed."""
    wrong = [value for value in found.wrong if value not in found.right]
    if any(map(_are_kinds, found.right)):
        if kinds := _wrong_kinds(found.right, wrong):
            return {"without": kinds}
    elif wrong:
        read = [value for value in found.movers if value not in found.usual]
        several = any(map(_is_number, read)) or not any(map(_is_number, wrong))
        if other := _same_as(name, rows):
            return {"as": [other]}
        if _same_as(name.replace(f"{ROPE}.full_", f"{ROPE}.sliding_"), rows):
            return READ  # The other one is refused unless it is the same.
        if several and any(map(_is_number, found.right)):
            return {"not": _unique(wrong)}
        return _unique(found.right)
    if not found.tried and not found.beside and not _is_size(name):
        return _unique(found.right)  # transformers refuses every other value.
    if found.tried and not found.movers:
        return INERT
    put = put_in(module)
    if any(name == p or name.startswith((f"{p}.", f"{p} (")) for p in put):
        return PUT_IN
    return READ if reads(module, name) else TRANSLATED


TWINS = {"query_pre_attn_scalar": "head_dim"}
"""Settings that a module may take for one another; those of two kinds of layers, too."""


def _same_as(name: str, rows: Iterable[Row]) -> str | None:
    """Return the setting whose value a setting has in all right trials, and in no wrong one."""
    other = TWINS.get(name) or name.replace(f"{ROPE}.sliding_", f"{ROPE}.full_")
    equal: dict[bool, set[bool]] = {True: set(), False: set()}
    for row in rows:
        named = row["settings"]
        right = row["outcome"] in RIGHT
        about = right or (changed_by(row)[0] in (name, other) and row["value"] != ABSENT)
        if about and name in named and other in named:
            equal[right].add(named[name] == named[other])
    return other if other != name and equal == {True: {True}, False: {False}} else None


def _are_kinds(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, str) for entry in value)


def _wrong_kinds(right: list[Any], wrong: list[Any]) -> list[Any]:
    """Return the entries that no right list has and every wrong one has one of."""
    known = {entry for value in right if isinstance(value, list) for entry in value}
    others = [{*value} - known for value in wrong if isinstance(value, list)]
    return sorted(set().union(*others)) if others and all(others) else []


def put_in(module: str) -> set[str]:
    """Return the settings that the row's fixes put in."""
    row = TRANSFORMS_BY_MODULE[f"mlx_lm.models.{module}"]
    return {name for fix in row.fixes for name in fix.settings}


def _counts(name: str, value: Any, outcome: str) -> bool:
    """Whether a failure makes a setting a fixed one.

    Sizes make other tensors: whatever they break is seen when the weights are loaded. Numbers
    that no model has break anything.
    """
    if _is_size(name):
        return False
    return outcome == "silent" or not isinstance(value, float)


def _is_size(name: str) -> bool:
    return SIZES.fullmatch(name.rpartition(".")[2]) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def proves(name: str, value: Any, row: Row) -> bool:
    """Whether a right trial proves a value right; one that cannot act there does not."""
    kinds, window = row["settings"].get("layer_types"), row["settings"].get("sliding_window")
    if name == "layer_types" and kinds and "sliding_attention" in kinds:
        return bool(window and window < LONG)
    if name == "sliding_window" and value and kinds and "sliding_attention" not in kinds:
        return False
    if name in LENGTHS and _is_number(value):
        return bool(value < LONG)
    changed = row["setting"] == name and row["outcome"] == "inert" and row["value"] != ABSENT
    return not (changed and LIMITS.fullmatch(name))


def _unique(values: list[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return sorted(found, key=str)


def _without_repeats(classes: dict[str, Class]) -> dict[str, Class]:
    """Leave out what a plain name says for every kind of rotary embedding."""
    return {
        name: found
        for name, found in classes.items()
        if " (" not in name or found != classes.get(name.partition(" (")[0])
    }


def render(record: Record) -> str:
    """Return the file's text, a line for each setting."""
    modules = []
    for module, kinds in sorted(record.items()):
        parts = []
        for kind, classes in sorted(kinds.items()):
            lines = (f"{json.dumps(n)}: {json.dumps(c)}" for n, c in sorted(classes.items()))
            parts.append(f"{json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n}")
        modules.append(f"{json.dumps(module)}: {{" + ",\n".join(parts) + "}")
    return "{\n" + ",\n".join(modules) + "\n}\n"


def refused_by(record: Record, row: Row) -> list[str]:
    """Return the settings for which the record refuses a trial's config."""
    classes = record.get(row["module"], {}).get(row["kind"], {})
    named = row["settings"]
    return [n for n, v in named.items() if not allows(class_of(classes, n), v, named)]


def disagreements(record: Record, rows: Iterable[Row]) -> Iterator[str]:
    """Yield the trials that the record gets wrong: wrong and not refused, or right and refused."""
    for row in rows:
        if row["outcome"] in ("refused", "weak"):
            continue
        refused = refused_by(record, row)
        own = [n for n in refused if n.partition(" (")[0] == row["setting"]]
        if row["outcome"] in RIGHT and own == refused:
            refused = [n for n in own if proves(n, row["settings"][n], row)]
        if (row["outcome"] in RIGHT) == bool(refused):
            what = f"{row['setting']} = {json.dumps(row['value'])}" if row["setting"] else ""
            said = f"refused for {', '.join(refused)}" if refused else "not refused"
            why = row["why"][:100]
            yield f"{row['family']} [{row['baseline']}] {what}: {row['outcome']}, {said} {why}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=FilePath)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    rows = list(rows_of(options.folder))
    record = settings_record.record() | record_of(rows)
    if not options.check:
        FILE.write_text(render(record))
    for line in disagreements(record, rows):
        print(line)


if __name__ == "__main__":
    main()
