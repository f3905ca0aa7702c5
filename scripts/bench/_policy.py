"""Misses of eviction policies, over those of Belady's policy, which knows the future.

Each policy runs over the same traces of one layer with 256 experts, 8 per token, of decode passes
of 1, 4 and 16 requests, alone and with a prompt of 256 tokens every 24 passes. The candidates are
the package's own ``Policy`` with other half-lives (``lru`` near 0, ``lfu`` without end) and other
shares of the slots that a prefill may take, and first in, first out. ``once`` counts an expert
once per pass, however many tokens chose it. With ``--model``, the routing is a checkpoint's own
(``_routing``).

``groups`` is the mean number of groups in which a prefill computes its experts. Recorded routing
is a file of ``scripts/bench/offload --traces``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _expert_traces import ROUTINGS, Pass, fewest, first_in_first_out, make
from _routing import record

from vllm_moe_compat.expert_cache.policy import FLOWING, HALF_LIFE, Policy

BATCHES, PROMPT, PASSES = (1, 4, 16), 256, 300
HALF_LIVES = {"lru": 1 / 64, "4": 4, "16": 16, "64": 64, "256": 256, "lfu": 1e6}
SHARES = (1, 0.5, 0.25)


def candidates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and arguments of ``run``."""
    for name, half_life in HALF_LIVES.items():
        yield f"{name}", {"half_life": half_life, "flowing": FLOWING}
    for share in SHARES:
        if share != FLOWING:
            yield f"{HALF_LIFE}, flowing {share}", {"half_life": HALF_LIFE, "flowing": share}
    yield f"{HALF_LIFE}, once", {"half_life": HALF_LIFE, "flowing": FLOWING, "once": True}
    yield "lru, flowing 1, once", {"half_life": 1 / 64, "flowing": 1, "once": True}


def run(
    trace: list[Pass],
    slots: int,
    experts: int,
    half_life: float,
    flowing: float,
    once: bool = False,
) -> dict[str, float]:
    """Misses, groups of a prefill, and microseconds of planning a pass."""
    policy = Policy(slots, experts, half_life=half_life, flowing=flowing)
    misses, groups = 0, []
    began = time.process_time()
    for one in trace:
        plan = policy.plan(one.wanted, None if once else one.uses)
        misses += sum(len(group.missing) for group in plan)
        if one.prefill:
            groups.append(len(plan))
    seconds = time.process_time() - began
    return {
        "misses": misses,
        "groups": statistics.mean(groups) if groups else 0,
        "us": seconds / len(trace) * 1e6,
    }


def compare(traces: dict[str, list[Pass]], share: float, experts: int) -> list[dict[str, Any]]:
    """One row per policy: misses over the fewest, over all traces, and for those with prompts."""
    slots = max(1, round(share * experts))
    least = {name: max(1, fewest(trace, slots)) for name, trace in traces.items()}
    total = sum(len(one.wanted) for trace in traces.values() for one in trace)
    rows = []
    for name, arguments in candidates():
        found = {case: run(trace, slots, experts, **arguments) for case, trace in traces.items()}
        rows.append(
            {"policy": name}
            | _summary({case: row["misses"] for case, row in found.items()}, least, total)
            | {
                "groups": _groups(row["groups"] for row in found.values()),
                "us_per_pass": round(statistics.median(row["us"] for row in found.values())),
            }
        )
    simple = {name: first_in_first_out(trace, slots) for name, trace in traces.items()}
    rows.append({"policy": "fifo"} | _summary(simple, least, total))
    rows.append({"policy": "belady"} | _summary(least, least, total))
    return [{"slots": slots, "experts": experts} | row for row in rows]


def _summary(misses: dict[str, Any], least: dict[str, int], total: int) -> dict[str, float]:
    ratios = [misses[name] / least[name] for name in least]
    return {
        "over_fewest": round(statistics.mean(ratios), 3),
        "most": round(max(ratios), 3),
        "hit_rate": round(1 - sum(misses.values()) / total, 3),
    }


def _groups(means: Iterable[float]) -> float:
    """The mean over traces with prefills."""
    counted = [mean for mean in means if mean]
    return round(statistics.mean(counted), 1) if counted else 0


def made_up() -> dict[str, list[Pass]]:
    """Every routing, batch, with and without prompts."""
    return {
        f"{name}, batch {batch}, prompts of {prompt}": make(
            routing, batch=batch, prefill=prompt, passes=PASSES
        )
        for name, routing in ROUTINGS.items()
        for batch in BATCHES
        for prompt in (0, PROMPT)
    }


def recorded(path: Path) -> tuple[dict[str, list[Pass]], int]:
    """Traces of a file by layer, and the number of experts."""
    content = json.loads(path.read_text())
    return {
        name: [
            Pass(np.array(one["wanted"]), np.array(one["uses"]), one["prefill"]) for one in trace
        ]
        for name, trace in content["traces"].items()
    }, content["experts"]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| slots | policy | misses ÷ fewest | most | hit rate | groups | µs per pass |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['slots']} of {row['experts']} | {row['policy']} | {row['over_fewest']:.3f} | "
            f"{row['most']:.3f} | {row['hit_rate']:.3f} | {row.get('groups', '')} | "
            f"{row.get('us_per_pass', '')} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/policy", description="Misses of eviction policies."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--traces", type=Path, help="recorded routing instead of made-up routing")
    parser.add_argument("--model", type=Path, help="a checkpoint whose routing is recorded")
    parser.add_argument("--text", type=Path, help="a file whose text --model reads")
    parser.add_argument("--pieces", type=int, default=8, help="pieces of the text (default 8)")
    parser.add_argument(
        "--shares", default="0.5,0.25,0.125,0.0625", help="slots over experts (default %(default)s)"
    )
    args = parser.parse_args()
    foreseen: dict[str, Any] = {}
    if args.model:
        traces, experts, foreseen = record(args.model, args.text, args.pieces)
    else:
        traces, experts = recorded(args.traces) if args.traces else (made_up(), 256)
    rows = []
    for share in map(float, args.shares.split(",")):
        rows += compare(traces, share, experts)
    print(json.dumps({"rows": rows, **foreseen}) if args.json else table(rows))
    if foreseen and not args.json:
        print("\n" + ", ".join(f"{name} {value}" for name, value in foreseen.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
