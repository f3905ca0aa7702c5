"""Speculation: what drafts cost, and how many are accepted.

``cost``: a model with random weights and an oracle that knows its greedy text. Steps without
drafts, with k wrong ones and with k right ones take turns on the same running requests. A figure
is the CPU time of such a step over that of a step without drafts, the median over rounds; the
control is the second turn without drafts over the first. With k right drafts a step gives k + 1
tokens, so *gain* is (k + 1) over its cost: above 1, speculation can pay.

``acceptance``: the demo checkpoint, which recites a text that it was trained on, with drafts from
n-grams and from its prediction head. *Passes per token* counts a row of a decode pass as a pass;
without drafts it is 1. ``recite`` says the text once; ``again`` has it in the prompt already.
All answers must be those without drafts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from _contexts import draw
from _drafts import Counted, Oracle
from _engine import Ours
from _model import Shape, SoftmaxShape, write
from _serve import machine, say

CONTEXT, STEPS, WARM_UP = 256, 6, 8
ANSWER = 160
PARTS = ("cost", "acceptance")
LINES = (
    "Beautiful is better than",
    "Simple is better than",
    "Errors should never",
    "Now is better",
)


def speculative(method: str, k: int) -> dict[str, Any]:
    ngrams = {"prompt_lookup_min": 2, "prompt_lookup_max": 4} if method == "ngram" else {}
    return {"speculative_config": {"method": method, "num_speculative_tokens": k, **ngrams}}


def steps_of(ours: Ours, count: int) -> float:
    """CPU seconds of so many engine steps."""
    began = time.process_time()
    for _ in range(count):
        ours._step()
    return time.process_time() - began


def cost(path: Path, vocab: int, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per number of drafts."""
    most = max(args.drafts)
    tokens = args.rounds * sum(3 * (STEPS + 1) + (k + 1) * (STEPS + 1) for k in args.drafts)
    tokens += 2 * WARM_UP + most
    longest = CONTEXT + tokens + most + 8
    ours = Ours(path, longest, batch, **speculative("ngram", most))
    try:
        drafting = ours.worker.runner.drafting
        drafting.lengths = counted = Counted()
        prompts = [[i, *([17 + i] * (CONTEXT - 1))] for i in range(batch)]
        contexts = [draw(ours.layers, CONTEXT - 1, i) for i in range(batch)]
        with ours.running(prompts, contexts, tokens + 2):
            while min(map(len, ours.tokens.values())) < tokens:
                ours._step()
            coming = {i: list(ours.tokens[str(i)]) for i in range(batch)}
        drafting.drafter = oracle = Oracle(coming, vocab)
        found: dict[int, list[dict[str, float]]] = {k: [] for k in args.drafts}
        with ours.running(prompts, contexts, tokens + 2):
            steps_of(ours, WARM_UP)

            def turn(k: int, wrong: bool = False) -> float:
                counted.most, oracle.wrong = k, wrong
                ours._step()  # Verifies what was proposed before, and proposes.
                counted.clear()
                seconds = steps_of(ours, STEPS)
                expected = 1 if wrong else k + 1
                assert counted.tokens == expected * counted.rows, "an oracle was wrong"
                return seconds

            for number in range(args.rounds):
                for k in args.drafts:
                    first, bad, good, second = turn(0), turn(k, True), turn(k), turn(0)
                    plain = (first + second) / 2
                    row = {"wrong": bad / plain, "right": good / plain, "control": second / first}
                    found[k].append(row)
                    say(f"{batch} x {k} drafts, round {number + 1}/{args.rounds}: {row}")
            assert all(
                ours.tokens[str(i)] == coming[i][: len(ours.tokens[str(i)])] for i in range(batch)
            ), "drafts changed the text"
    finally:
        ours.close()
    return [
        {"batch": batch, "drafts": k}
        | {name: median([row[name] for row in rows]) for name in rows[0]}
        | {"gain": median([(k + 1) / row["right"] for row in rows])}
        for k, rows in found.items()
    ]


def acceptance(checkpoint: Path, method: str, k: int) -> list[dict[str, Any]]:
    """A row per case: one and four sequences that recite, for the first time and again."""
    from transformers import AutoTokenizer

    from vllm_moe_compat.demo.text import END_OF_TEXT, zen

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lines = [tokenizer(line).input_ids for line in LINES]
    said = tokenizer(zen() + END_OF_TEXT).input_ids
    ours = Ours(checkpoint, 1024, len(LINES), **speculative(method, k))
    rows = []
    try:
        drafting = ours.worker.runner.drafting
        drafting.lengths = counted = Counted()
        for name, before in (("recite", []), ("again", said)):
            for batch in (1, len(LINES)):
                prompts = [before + line for line in lines[:batch]]
                counted.most = 0
                expected = _answers(ours, prompts)
                counted.most = k
                counted.clear()
                assert _answers(ours, prompts) == expected, "drafts changed the text"
                row = {"method": method, "drafts": k, "case": f"{name} x{batch}"}
                rows.append(row | counted.result())
                say(str(rows[-1]))
    finally:
        ours.close()
    return rows


def _answers(ours: Ours, prompts: list[list[int]]) -> dict[str, list[int]]:
    ours.tokens = {}
    for i, prompt in enumerate(prompts):
        ours.add(str(i), prompt, ANSWER)
    while ours.engine.has_unfinished_requests():
        ours._step()
    return dict(ours.tokens)


def median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def table(result: dict[str, Any]) -> str:
    lines = []
    for part in PARTS:
        rows = result.get(part)
        if rows:
            lines += ["| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |"]
            lines += ["|" + "---|" * len(rows[0])]
            lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows] + [""]
    for name in ("model", "machine"):
        if name in result:
            lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in result[name].items()))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{one:.2f}" for one in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--quick", action="store_true", help="1 round, 1 and 4 drafts: a look")
    add("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    add("--drafts", type=numbers, help="numbers of drafts (default 1,2,3,4)")
    add("--batches", type=numbers, default=[1, 4], help="of the cost (default 1,4)")
    add("--methods", type=lambda text: text.split(","), default=["ngram", "mtp"])
    add("--rounds", type=int, help="of the cost (default 5)")
    add("--checkpoint", type=Path, help="a demo checkpoint (default: built where it is kept)")
    add("--softmax", action="store_true", help="the cost of a Qwen3 MoE, which has no states")
    for name, value in vars(Shape(hidden=256)).items():
        add(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.drafts = args.drafts or ([1, 4] if args.quick else [1, 2, 3, 4])
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    # Drafts are proposed whether they pay or not.
    os.environ["VLLM_MOE_COMPAT_PARK_DRAFTS"] = "0"
    result: dict[str, Any] = {}
    if "cost" in args.parts:
        kind = SoftmaxShape if args.softmax else Shape
        shape = kind(**{name: getattr(args, name) for name in vars(Shape())})
        with tempfile.TemporaryDirectory() as folder:
            result["model"] = write(Path(folder), shape, 8192)
            result["cost"] = [
                row for n in args.batches for row in cost(Path(folder), args.vocab, n, args)
            ]
    if "acceptance" in args.parts:
        from vllm_moe_compat import demo

        checkpoint = demo.build(args.checkpoint or demo.default_path(), progress=say).path
        result["acceptance"] = [
            row for m in args.methods for k in args.drafts for row in acceptance(checkpoint, m, k)
        ]
    return result | {"machine": machine()}


def main() -> int:
    args = parse()
    # Whatever the libraries print, stdout holds the result alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with redirect_stdout(sys.stderr):
        result = run(args)
    out.write((json.dumps(result) if args.json else table(result)) + "\n")
    out.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
