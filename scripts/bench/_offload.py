"""Experts on disk over experts in memory: speed, hit rate, bytes read and memory.

The checkpoint has 256 experts per layer, 8 of them for a token, in one of the forms of
``_offload_model``; it is written once into a cache folder. It is computed in float32.

``turns``: one process holds the model resident and with every size of cache, and they take turns:
a prompt, then decode steps, with tokens drawn by the same seed. All have to draw the same tokens,
so a run also proves that a cache changes nothing. Speeds are ratios of CPU and of wall seconds to
the resident model's of the same round, medians over rounds; the page cache is warm.

``alone``: one process holds one model. Its peak memory is over what it held after its imports.
Rounds with a warm page cache and rounds before each of whose passes the files are dropped from it
take turns; ``cold`` is the ratio of their decode times, and ``from_disk`` what share of the bytes
that were read came from the disk then.

``reads`` are misses over the fewest that any policy has on the same passes (Belady's), and
``distinct`` over one read per expert and layer. ``waited`` is the part of the time that is spent
reading. The least cache holds one token's experts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _expert_traces import Pass, fewest
from _load import clear_peak, peak, resident, say
from _offload_model import FORMS, Model, made

RESIDENT, LEAST = "off", "least"
SHARES = ("50%", "25%", "12.5%", LEAST)
CACHE = "VLLM_MOE_COMPAT_EXPERT_CACHE"
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Work:
    """What a round does.

    Attributes:
        batch: sequences.
        prompt: tokens of each.
        steps: decode steps.
    """

    batch: int
    prompt: int
    steps: int


class Side:
    """A loaded model, and the seconds that it took."""

    def __init__(self, model: Model, folder: Path, share: str) -> None:
        import mlx.core as mx

        from vllm_moe_compat.backend.model import loader
        from vllm_moe_compat.expert_cache.install import containers

        # A size below what one token needs is refused, so the least one is named.
        least = f"{100 * model.chosen / model.experts}%"
        os.environ[CACHE] = least if share == LEAST else share
        self.model = loader.load(str(folder), None, mx.float32).model
        self.files = sorted(folder.glob("*.safetensors"))
        self.cached = containers(self.model)
        self.traces: dict[str, list[Pass]] = {}
        self.prefill = False
        self.misses: dict[str, int] = {}
        for container in self.cached:
            self._record(container.layer, container._policy)

    def _record(self, layer: str, policy: Any) -> None:
        """Keep what each pass wants of a layer."""
        trace = self.traces.setdefault(layer, [])
        plan = policy.plan

        def planned(wanted: Any, uses: Any) -> Any:
            trace.append(Pass(wanted, uses, self.prefill))
            return plan(wanted, uses)

        policy.plan = planned

    def round(self, work: Work, seed: int, *, cold: bool = False) -> dict[str, Any]:
        """One prompt and its decode steps; seconds, counts and tokens."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        draw = np.random.default_rng(seed)
        vocab = self.model.args.vocab_size
        tokens = mx.array(draw.integers(0, vocab, (work.batch, work.prompt)))
        caches = make_prompt_cache(self.model)
        key = mx.random.key(seed)
        found: list[Any] = []
        parts = {}
        for name, steps in (("prefill", 1), ("decode", work.steps)):
            self.prefill = name == "prefill"
            with self._counted(parts, name):
                for _ in range(steps):
                    if cold:
                        self.drop()
                    logits = self.model(tokens, cache=caches)[:, -1]
                    key, now = mx.random.split(key)
                    tokens = mx.random.categorical(logits / TEMPERATURE, key=now)[:, None]
                    mx.eval(tokens)
                    found.append(tokens[:, 0].tolist())
        return {"tokens": found, **parts}

    @contextmanager
    def _counted(self, parts: dict[str, Any], name: str) -> Iterator[None]:
        from vllm_moe_compat.expert_cache.counters import Counters, layers

        # Models of one process share the counters of their layers.
        before, disk, read = layers(), _io("read_bytes"), _io("rchar")
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        row = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        row |= {"from_disk": _io("read_bytes") - disk, "from_files": _io("rchar") - read}
        after = {
            layer: counts - before.get(layer, Counters()) for layer, counts in layers().items()
        }
        for layer, counts in after.items():
            self.misses[layer] = self.misses.get(layer, 0) + counts.misses
        parts[name] = row | asdict(sum(after.values(), Counters()))

    def drop(self) -> None:
        """Drop the files from the page cache."""
        for file in self.files:
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _io(field: str) -> int:
    """``read_bytes``: fetched from the disk; ``rchar``: read from files, cached or not."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/io")


def turns(
    model: Model, folder: Path, shares: list[str], works: list[Work], rounds: int
) -> dict[str, Any]:
    """Resident and every cache in one process, by turns; the first round warms up."""
    sides = {share: Side(model, folder, share) for share in (RESIDENT, *shares)}
    found: dict[tuple[Work, str], list[dict[str, Any]]] = {}
    for work in works:
        for number in range(rounds + 1):
            for share in list(sides)[:: -1 if number % 2 else 1]:
                found.setdefault((work, share), []).append(sides[share].round(work, number))
    rows = []
    for share in shares:
        cases = []
        for work in works:
            plain, cached = found[work, RESIDENT], found[work, share]
            if [one["tokens"] for one in plain] != [one["tokens"] for one in cached]:
                raise RuntimeError(f"{folder.name}: {share} draws other tokens than resident")
            cases.append(_compared(work, plain[1:], cached[1:]))
        rows.append(
            {
                "share": share,
                "slots": [container.slots for container in sides[share].cached],
                "policy": _against_fewest(sides[share]),
                "cases": cases,
            }
        )
    last = sides[shares[-1]].traces
    traces = {
        layer: [
            {"wanted": p.wanted.tolist(), "uses": p.uses.tolist(), "prefill": p.prefill}
            for p in trace
        ]
        for layer, trace in last.items()
    }
    return {"rows": rows, "traces": traces}


def _compared(
    work: Work, plain: list[dict[str, Any]], cached: list[dict[str, Any]]
) -> dict[str, Any]:
    """Ratios of speed (above 1 is faster than resident) and counts of one kind of work."""
    row: dict[str, Any] = asdict(work)
    for part in ("prefill", "decode"):
        for clock in ("cpu", "wall"):
            ratios = [
                one[part][clock] / two[part][clock] for one, two in zip(plain, cached, strict=True)
            ]
            row[f"{part}_speed_{clock}"] = round(statistics.median(ratios), 3)
        row[f"{part}_resident_ms"] = _milliseconds(plain, part, work)
        row[f"{part}_cached_ms"] = _milliseconds(cached, part, work)
        row[f"{part}_waited"] = round(
            sum(one[part]["seconds_waited"] for one in cached)
            / sum(one[part]["wall"] for one in cached),
            3,
        )
        uses = sum(one[part]["hits"] + one[part]["misses"] for one in cached)
        misses = sum(one[part]["misses"] for one in cached)
        row[f"{part}_hit_rate"] = round(1 - misses / uses, 3)
        row[f"{part}_miss_ms"] = round(
            1e3 * sum(one[part]["seconds_waited"] for one in cached) / max(1, misses), 3
        )
        row[f"{part}_groups"] = round(
            sum(one[part]["groups"] for one in cached) / sum(one[part]["passes"] for one in cached),
            1,
        )
    tokens = work.steps * work.batch * len(cached)
    row["file_mib_per_token"] = round(
        sum(one["decode"]["from_files"] for one in cached) / tokens / 2**20, 3
    )
    return row


def _milliseconds(rounds: list[dict[str, Any]], part: str, work: Work) -> float:
    """Median wall milliseconds of a step, or of the prefill."""
    steps = work.steps if part == "decode" else 1
    return round(1e3 * statistics.median(one[part]["wall"] for one in rounds) / steps, 2)


def _against_fewest(side: Side) -> dict[str, float]:
    """Misses over all passes, over the fewest possible and over one per expert."""
    least = distinct = 0
    for container in side.cached:
        trace = side.traces[container.layer]
        least += fewest(trace, container.slots)
        distinct += len({expert for one in trace for expert in one.wanted.tolist()})
    misses = sum(side.misses.values())
    return {"reads": round(misses / least, 3), "distinct": round(misses / distinct, 3)}


def alone(
    model: Model, folder: Path, shares: list[str], works: list[Work], rounds: int
) -> dict[str, Any]:
    """Peak memory of one model, and decoding with a cold page cache."""
    # What every load imports is no part of a model's memory.
    tiny = replace(model, layers=1, hidden=128, intermediate=128, experts=8, vocab=256)
    Side(tiny, made(tiny, folder.parent), RESIDENT)
    gc.collect()
    clear_peak()
    base = resident()
    side = Side(model, folder, shares[0])
    result: dict[str, Any] = {"load_peak": peak() - base}
    if side.cached:
        result["held"] = sum(container.nbytes for container in side.cached)
    for work in works:
        side.round(work, 0)
    result["peak"] = peak() - base
    if not side.cached:
        return result
    warm, cold = [], []
    for number in range(1, rounds + 1):
        warm.append(side.round(works[0], number)["decode"])
        cold.append(side.round(works[0], 1000 + number, cold=True)["decode"])
    ratios = [two["wall"] / one["wall"] for one, two in zip(warm, cold, strict=True)]
    result["cold"] = round(statistics.median(ratios), 3)
    fetched = sum(one["from_disk"] for one in cold) / sum(one["from_files"] for one in cold)
    return result | {"from_disk": round(fetched, 3)}


def child(task: dict[str, Any]) -> dict[str, Any]:
    """This process is measured."""
    import vllm_moe_compat

    vllm_moe_compat.apply()
    function = {"turns": turns, "alone": alone}[task["mode"]]
    model = Model(**task["model"])
    works = [Work(**work) for work in task["works"]]
    return function(model, Path(task["folder"]), task["shares"], works, task["rounds"])


def start(mode: str, model: Model, folder: Path, shares: list[str], args: Any) -> dict[str, Any]:
    """Run one child and return what it found."""
    task = {
        "mode": mode,
        "model": asdict(model),
        "folder": str(folder),
        "shares": shares,
        "works": [asdict(work) for work in args.works],
        "rounds": args.rounds,
    }
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(model: Model, args: Any) -> dict[str, Any]:
    """All shares of one model."""
    folder = made(model, args.cache)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    say(f"{folder.name}: {size / 2**20:,.0f} MiB on disk")
    whole = None if args.no_resident else start("alone", model, folder, [RESIDENT], args)
    compared: list[dict[str, Any]] = [{"share": share} for share in args.shares]
    if whole is not None:
        found = start("turns", model, folder, args.shares, args)
        compared = found["rows"]
        if args.traces:
            content = {"experts": model.experts, "traces": found["traces"]}
            args.traces.write_text(json.dumps(content))
    rows = []
    for row in compared:
        row |= start("alone", model, folder, [row["share"]], args)
        if whole is not None:
            row["memory"] = round(row["peak"] / whole["peak"], 3)
        say(f"  {json.dumps(row)}")
        rows.append(row)
    return {"model": asdict(model), "disk_bytes": size, "resident": whole, "rows": rows}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| form | routing | cache | memory | batch | decode speed (wall) | hit rate | waited "
        "| ms per miss | prefill speed (wall) | groups | reads | cold |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        model = case["model"]
        for row in case["rows"]:
            for work in row.get("cases", []):
                lines.append(
                    f"| {model['form']} | {'skewed' if model['skewed'] else 'uniform'} | "
                    f"{row['share']} | {row['memory']:.2f} | {work['batch']} | "
                    f"{work['decode_speed_cpu']:.2f} ({work['decode_speed_wall']:.2f}) | "
                    f"{work['decode_hit_rate']:.2f} | {work['decode_waited']:.2f} | "
                    f"{work['decode_miss_ms']:.2f} | "
                    f"{work['prefill_speed_cpu']:.2f} ({work['prefill_speed_wall']:.2f}) | "
                    f"{work['prefill_groups']} | {row['policy']['reads']:.2f} | "
                    f"{row['cold']:.2f} |"
                )
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/offload",
        description="Experts on disk over experts in memory (Linux only).",
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--quick", action="store_true", help="two layers, short rounds")
    add("--form", default="fp8,int4", help=f"of {','.join(FORMS)} (default %(default)s)")
    add("--shares", default=",".join(SHARES), help="sizes of the cache (default %(default)s)")
    add("--routing", default="uniform,skewed", help="uniform, skewed or both (default)")
    add("--layers", type=int, default=4, help="layers (default %(default)s)")
    add("--hidden", type=int, default=512, help="width of a token (default %(default)s)")
    add("--rounds", type=int, default=3, help="rounds per case (default %(default)s)")
    add("--no-resident", action="store_true", help="caches only, where resident does not fit")
    add("--traces", type=Path, help="write the last turns' routing for scripts/bench/policy")
    default = Path(__file__).resolve().parents[2] / ".cache" / "bench-offload"
    add("--cache", type=Path, default=default, help="folder for the checkpoints")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.form, args.shares = args.form.split(","), args.shares.split(",")
    if unknown := set(args.form) - set(FORMS):
        parser.error(f"--form knows {', '.join(FORMS)}, not {', '.join(sorted(unknown))}")
    args.works = [Work(1, prompt=96, steps=32), Work(4, prompt=24, steps=32)]
    if args.quick:
        args.layers, args.rounds = min(args.layers, 2), min(args.rounds, 2)
        args.works = [replace(work, prompt=work.prompt // 2, steps=16) for work in args.works]
    return args


def main() -> int:
    args = parse()
    # Whatever the libraries print, stdout holds the result alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if args.child:
        out.write(json.dumps(child(args.child)) + "\n")
        out.close()
        return 0
    from _serve import machine

    shape = Model(layers=args.layers, hidden=args.hidden, intermediate=args.hidden // 2)
    models = [
        replace(shape, form=form, skewed=routing == "skewed")
        for form in args.form
        for routing in args.routing.split(",")
    ]
    result = {"cases": [measure(model, args) for model in models], "machine": machine()}
    out.write((json.dumps(result) if args.json else table(result)) + "\n")
    out.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
