"""Change one setting at a time, in every family, and record what happens; see ``__main__``.

Each family has a file of one JSON object per trial. What is there already is not tried again; a
trial that ended the process is recorded as ``crashed``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

from parity.families import FAMILIES
from settings.baselines import OPTIONAL, Baseline, Config, Path, baselines
from settings.trial import Bench, Logits, without_record
from settings.values import ABSENT, alternatives
from vllm_moe_compat.families.settings_record import NEVER, named_settings

ROWLESS = {"dbrx"}
NAMES = [
    name
    for name in FAMILIES
    if name not in ROWLESS and (" " not in name or name == "mistral3 mistral4")
]
"""Families with a row; of the variants, those of another class. Baselines cover the rest."""


def paths(settings: Config, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield path and value of every setting; dicts of ``rope_parameters`` are walked."""
    for key, value in settings.items():
        if NEVER.fullmatch(key):
            continue
        if isinstance(value, dict) and (prefix or key == "rope_parameters"):
            yield from paths(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def lookup(settings: Config, path: Path) -> Any:
    """Return the value at a path; ``ABSENT`` if there is none."""
    value: Any = settings
    for part in path:
        value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def difference(settings: Config, around: Config) -> Config:
    """Return the named settings that differ; None for those that are gone."""
    found = {name: value for name, value in settings.items() if around.get(name) != value}
    return found | {name: None for name in around.keys() - settings.keys() if around[name]}


def trials(bench: Bench, baseline: Baseline, file: Config) -> Iterator[tuple[Path, Any]]:
    """Yield the settings and values to try in a baseline."""
    settings = bench.resolve(file)
    default = type(bench.config_class.from_dict(file).get_text_config(decoder=True))().to_dict()
    layers = settings.get("num_hidden_layers") or 2
    for path, value in paths(settings):
        if not baseline.varies(path):
            continue
        extra: tuple[Any, ...] = ()
        if path[0] == "rope_parameters" and path[-1] != "rope_type":
            kind = lookup(settings, (*path[:-1], "rope_type"))
            extra = OPTIONAL.get(kind, {}).get(path[-1], ())
        if path[-1] == "rope_type":
            continue  # A baseline of its own, with the keys that it needs.
        for other in (*alternatives(path[-1], value, lookup(default, path), layers), *extra):
            yield path, other
    ropes = {path[:-1] for path, _ in paths(settings) if path[-1] == "rope_type"}
    for at in ropes:
        own = lookup(settings, at)
        for key, values in OPTIONAL.get(own.get("rope_type"), {}).items():
            if key not in own and baseline.varies((*at, key)):
                for value in values:
                    yield (*at, key), value


def sweep(name: str, out: FilePath) -> int:
    """Run the trials of a family that are not recorded yet; return their number."""
    family = FAMILIES[name]
    log, pending = out / f"{name}.jsonl", out / f"{name}.pending"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if pending.exists():
        crashed = json.loads(pending.read_text()) | {"outcome": "crashed"}
        _append(log, crashed)
        rows.append(crashed)
        pending.unlink()
    done = {_key(row) for row in rows}
    bench = Bench(family)
    text = bench.resolve(bench.file)
    new = 0

    def attempt(
        baseline: Baseline, path: Path, value: Any, file: Config, base: Logits | None
    ) -> Logits | None:
        nonlocal new
        row: dict[str, Any] = {
            "module": family.module,
            "kind": text["model_type"],
            "baseline": baseline.name,
            "setting": ".".join(path),
            "value": value,
        }
        new += 1
        pending.write_text(json.dumps(row))
        outcome, logits = bench.run(file, base)
        if outcome.word != "invalid":
            settings = dict(named_settings(bench.resolve(file)))
            if path:
                around = dict(named_settings(bench.resolve(bench.changed(baseline.changes))))
                row["changed"] = difference(settings, around)
            else:
                row["settings"] = settings
        row |= {"outcome": outcome.word, "moved": outcome.moved}
        row |= {"distance": outcome.distance, "why": outcome.why}
        _append(log, row)
        rows.append(row)
        pending.unlink()
        return logits

    first: Logits | None = None
    for baseline in baselines(text, bench.section(bench.file), text.get("num_hidden_layers") or 2):
        file = bench.changed(baseline.changes)
        found = next((r for r in rows if _key(r) == (baseline.name, "", "null")), None)
        if found is None:
            logits = attempt(baseline, (), None, file, first)
            found = rows[-1]
        elif found["outcome"] in ("invalid", "crashed"):
            continue
        else:
            logits = bench.reference(file)[1]
        first = first if baseline.name else logits
        if found["outcome"] in ("invalid", "refused", "fails", "silent"):
            continue
        for path, value in trials(bench, baseline, file):
            row = {"baseline": baseline.name, "setting": ".".join(path), "value": value}
            if _key(row) not in done:
                done.add(_key(row))
                attempt(baseline, path, value, bench.changed([(path, value)], file), logits)
    return new


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["baseline"], row["setting"], json.dumps(row["value"])


def _append(log: FilePath, row: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def quiet() -> None:
    """Silence warnings about configs that nobody would publish, and take one thread."""
    import warnings

    import torch
    import transformers

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    import logging

    logging.disable(logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=NAMES)
    parser.add_argument("--out", type=FilePath, required=True)
    options = parser.parse_args()
    os.environ["VLLM_MOE_COMPAT_DTYPE"] = "float32"
    import vllm_moe_compat

    quiet()
    with vllm_moe_compat.applied(), without_record():
        for name in options.families or NAMES:
            finished = options.out / f"{name}.done"
            if finished.exists():
                continue
            began = time.monotonic()
            count = sweep(name, options.out)
            finished.touch()
            print(f"{name}: {count} trials in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
