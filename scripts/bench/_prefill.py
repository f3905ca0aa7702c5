"""Prompt tokens/s of the embedded backend over mlx-lm's, from a prompt to its first token.

Both sides compute the same prompts over the same model object in one process and take turns:
a round is mlx-lm, ours, mlx-lm. One prompt goes through mlx-lm's ``generate_step``, several
through its ``BatchGenerator``, both with mlx-lm's default of 2,048 tokens per step; ours goes
through vLLM's engine, with the tokens per step that the case names. A case's ratio is the
median over rounds of the mean of mlx-lm's two turns to ours; the control is the median ratio
of those two to each other, which would be 1 on a quiet machine. Both must choose the same first
tokens.

``cpu_ratio`` and ``cpu_control`` are the same of the process's CPU seconds, which other
processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _engine import Ours
from _model import Shape, SoftmaxShape, write
from _serve import machine, say

STEP = 2048  # mlx-lm's default
DEFAULT_CASES = ("1x512", "1x2048", "1x2048/512", "4x512", "4x512-ragged")
RAGGED = (1.0, 0.5, 0.25, 0.0625)
Turn = tuple[float, float]


@dataclass(frozen=True)
class Case:
    """``name`` is PROMPTSxTOKENS[/CHUNK][-ragged]; ``chunk``: tokens of a step of ours."""

    name: str
    lengths: tuple[int, ...]
    chunk: int

    @classmethod
    def parse(cls, name: str) -> Case:
        sizes, _, kind = name.partition("-")
        sizes, _, chunk = sizes.partition("/")
        try:
            count, length = (int(part) for part in sizes.split("x"))
            budget = int(chunk) if chunk else count * length
        except ValueError:
            raise argparse.ArgumentTypeError(f"{name!r} is not like 1x2048/512") from None
        if kind not in ("", "ragged") or min(count, budget) < 1 or length < 2:
            raise argparse.ArgumentTypeError(f"{name!r} is not like 1x2048/512 or 4x512-ragged")
        shares = RAGGED if kind else (1.0,)
        lengths = tuple(max(2, int(length * shares[i % len(shares)])) for i in range(count))
        return cls(name, lengths, budget)

    def prompts(self, vocab: int, number: int) -> list[list[int]]:
        """Token ids of round ``number``."""
        draw = random.Random(f"{self.name} {number}").randrange
        return [[draw(vocab - 16) for _ in range(n)] for n in self.lengths]


def timed(function: Any, *args: Any) -> tuple[Turn, list[int]]:
    """Seconds and CPU seconds of a call, and what it returns."""
    import mlx.core as mx

    mx.synchronize()
    began, used = time.perf_counter(), time.process_time()
    tokens = function(*args)
    mx.synchronize()
    return (time.perf_counter() - began, time.process_time() - used), tokens


def theirs(model: Any, prompts: list[list[int]]) -> list[int]:
    """First tokens by mlx-lm."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator, generate_step

    if len(prompts) == 1:
        # A generator asked for one token computes two.
        taken: list[int] = []

        def sampler(logprobs: mx.array) -> mx.array:
            taken.append(mx.argmax(logprobs, axis=-1))
            return taken[-1]

        for _ in generate_step(mx.array(prompts[0]), model, max_tokens=0, sampler=sampler):
            pass
        return [int(taken[0])]
    generator = BatchGenerator(
        model, max_tokens=1, completion_batch_size=len(prompts), prefill_batch_size=len(prompts)
    )
    found: dict[int, int] = {}
    uids = generator.insert(prompts)
    while len(found) < len(prompts):
        for response in generator.next()[1]:
            found[response.uid] = response.token
    generator.close()
    return [found[uid] for uid in uids]


def ours(engine: Ours, prompts: list[list[int]]) -> list[int]:
    """First tokens by the backend."""
    found: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt)
    while len(found) < len(prompts):
        for output in engine.engine.step():
            if output.outputs[0].token_ids:
                found[output.request_id] = output.outputs[0].token_ids[0]
    engine.drop([])
    return [found[str(i)] for i in range(len(prompts))]


def measure(case: Case, engine: Ours, vocab: int, rounds: int) -> dict[str, Any]:
    """One case: its rates, its ratios, and the controls."""
    model = engine.worker.get_model()
    engine.budget(case.chunk)
    turns: list[tuple[Turn, Turn, Turn]] = []
    same = total = 0
    for number in range(rounds + 1):
        prompts = case.prompts(vocab, number)
        first, expected = timed(theirs, model, prompts)
        mine, tokens = timed(ours, engine, prompts)
        second, _ = timed(theirs, model, prompts)
        same += sum(a == b for a, b in zip(tokens, expected, strict=True))
        total += len(prompts)
        ratios = [(a + b) / 2 / m for a, m, b in zip(first, mine, second, strict=True)]
        say(
            f"{case.name}: round {number}/{rounds}: {ratios[0]:.3f}, by CPU seconds "
            f"{ratios[1]:.3f} (control {second[0] / first[0]:.3f}, {second[1] / first[1]:.3f})"
        )
        if number:  # The first one warms up.
            turns.append((first, mine, second))
    say(f"{case.name}: {same} of {total} first tokens are the same on both sides")
    count = sum(case.lengths)

    def ratio(kind: int) -> float:
        return median([(a[kind] + b[kind]) / 2 / m[kind] for a, m, b in turns])

    return {
        "case": case.name,
        "chunk": case.chunk,
        "ratio": ratio(0),
        "control": median([b[0] / a[0] for a, _, b in turns]),
        "cpu_ratio": ratio(1),
        "cpu_control": median([b[1] / a[1] for a, _, b in turns]),
        "ours_tokens_per_s": median([count / m[0] for _, m, _ in turns]),
        "mlx_lm_tokens_per_s": median([2 * count / (a[0] + b[0]) for a, _, b in turns]),
        "same_tokens": round(same / total, 4),
    }


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def table(result: dict[str, Any]) -> str:
    lines = [
        "| case | ratio | control | by CPU seconds | control | ours, tokens/s | mlx-lm, tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        lines.append(
            f"| {row['case']} | {row['ratio']:.2f} | {row['control']:.2f} | "
            f"{row['cpu_ratio']:.2f} | {row['cpu_control']:.2f} | "
            f"{row['ours_tokens_per_s']:.0f} | {row['mlx_lm_tokens_per_s']:.0f} |"
        )
    for name in ("model", "machine"):
        lines.append("\n" + f"{name}: " + ", ".join(f"{k} {v}" for k, v in result[name].items()))
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench/prefill", description=__doc__)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add(
        "--cases",
        type=lambda text: [Case.parse(name) for name in text.split(",")],
        default=[Case.parse(name) for name in DEFAULT_CASES],
        help="PROMPTSxTOKENS[/CHUNK][-ragged], separated by commas; CHUNK is "
        f"--max-num-batched-tokens, default all tokens (default {','.join(DEFAULT_CASES)})",
    )
    add("--rounds", type=int, default=5, help="rounds per case (default 5), after a warm-up")
    add("--hybrid", action="store_true", help="a Qwen3.5 MoE, most of whose layers have states")
    for name, value in vars(SoftmaxShape()).items():
        add(f"--{name}", type=int, default=value, help=f"default {value}")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    kind = Shape if args.hybrid else SoftmaxShape
    shape = kind(**{name: getattr(args, name) for name in vars(SoftmaxShape())})
    longest = max(max(case.lengths) for case in args.cases) + 16
    batch = max(len(case.lengths) for case in args.cases)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = write(path, shape, longest)
        most = max(max(case.chunk for case in args.cases), longest)
        engine = Ours(path, longest, batch, max_num_batched_tokens=most)
        try:
            cases = [measure(case, engine, args.vocab, args.rounds) for case in args.cases]
        finally:
            engine.close()
    return {"cases": cases, "model": model, "machine": machine()}


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
