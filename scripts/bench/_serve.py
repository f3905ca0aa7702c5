"""Decode tokens/s of the embedded backend over mlx-lm's BatchGenerator.

Both sides hold the same requests over the same model object in one process and
take turns: a round is mlx-lm, ours, ours without compiled passes, mlx-lm, each for
the same number of steps. A case's ratio is the median over rounds of ours to the
mean of mlx-lm's two turns; the control is the median ratio of those two to each
other, which would be 1 on a quiet machine. Prompts are there before the clock starts (see
``_contexts``), both sides are warmed up, and both must generate the same tokens.

``ratio`` is end to end: vLLM's engine step, with its scheduler, our worker
and its output processing, against ``BatchGenerator.next``. ``worker_ratio``
counts only what the worker does of it. ``cpu_ratio`` and ``cpu_control`` compare the
process's CPU seconds, which other processes disturb less; ``plain_ratio`` and
``plain_cpu_ratio`` are those without compiled passes.

The other parts are ratios of the backend to itself or to vLLM's sampler; see
``_steps`` and ``_sampling``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _engine import Ours
from _model import Shape, write

if TYPE_CHECKING:
    from _contexts import Context

# Contexts of a ragged batch, as shares of the longest.
RAGGED = (1.0, 0.5, 0.25, 0.0625)
WARM_UP, MOST_STEPS = 4, 32
PARTS = ("decode", "overhead", "mixed", "prefix", "sampling")
PARTS_HELP = """parts:
  decode    tokens/s over mlx-lm's BatchGenerator, for each of --cases
  overhead  16x1024: ms of a decode step in which MLX has nothing to do because the worker's
            Python runs, before the pass begins and after it ends, and their share of the step
  mixed     a step of 8 decodes and a 64-token chunk of a prompt, over a step of the 8 decodes
            plus a step of the chunk
  prefix    time to first token of a prompt whose first 2,048 tokens are cached, over that of
            one of the same length that is not
  sampling  time to draw 8 tokens of 152k in MLX, over vLLM's sampler on a copy of the logits;
            peaked logits like a language model's, and flat ones
"""
DEFAULT_CASES = ("1x1024", "4x1024", "4x4096", "4x4096-ragged", "16x1024")


@dataclass(frozen=True)
class Case:
    """``name`` is BATCHxCONTEXT, with ``-ragged`` for prompts of different lengths."""

    name: str
    lengths: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Case:
        sizes, _, kind = name.partition("-")
        try:
            batch, length = (int(part) for part in sizes.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{name!r} is not like 4x1024") from None
        if kind not in ("", "ragged") or batch < 1 or length < 2:
            raise argparse.ArgumentTypeError(f"{name!r} is not like 4x1024 or 4x4096-ragged")
        shares = RAGGED if kind else (1.0,)
        lengths = tuple(max(2, int(length * shares[i % len(shares)])) for i in range(batch))
        return cls(name, lengths)

    def prompts(self, vocab: int) -> list[list[int]]:
        """Token ids; each prompt begins with its number."""
        draw = random.Random(self.name)
        return [
            [i, *(draw.randrange(vocab - 16) for _ in range(n - 1))]
            for i, n in enumerate(self.lengths)
        ]


class Theirs:
    """mlx-lm's BatchGenerator over the same model object."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def running(
        self, prompts: list[list[int]], contexts: list[Context], steps: int
    ) -> Iterator[None]:
        """With all requests generating."""
        import mlx.core as mx
        from _contexts import as_prompt_cache
        from mlx_lm.generate import BatchGenerator

        self.generator = BatchGenerator(
            self.model,
            max_tokens=steps,
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
        )
        self.tokens: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        self.generator.insert(
            [prompt[-1:] for prompt in prompts],
            caches=[as_prompt_cache(self.model, context) for context in contexts],
        )
        while not self._step():
            pass
        try:
            yield
        finally:
            self.generator.close()
            del self.generator
            mx.clear_cache()

    def _step(self) -> int:
        _, responses = self.generator.next()
        for response in responses:
            self.tokens[response.uid].append(response.token)
        return len(responses)

    def decode(self, steps: int, batch: int) -> float:
        """Seconds for that many steps, begun and ended with nothing under way."""
        import mlx.core as mx

        mx.synchronize(self.generator.stream)
        began = time.perf_counter()
        for _ in range(steps):
            assert self._step() == batch, "a request ended early"
        mx.synchronize(self.generator.stream)
        return time.perf_counter() - began


def measure(case: Case, ours: Ours, theirs: Theirs, args: argparse.Namespace) -> dict[str, Any]:
    """One case: its rates, its ratios, and the control."""
    from _contexts import draw

    batch = len(case.lengths)
    prompts = case.prompts(args.vocab)
    limit = most_tokens(args)
    rounds: list[Round] = []
    # A prompt's last token is computed by both sides.
    contexts = [draw(ours.layers, n - 1, seed) for seed, n in enumerate(case.lengths)]
    with (
        theirs.running(prompts, contexts, limit),
        ours.running(prompts, contexts, limit),
    ):
        del contexts
        theirs.decode(WARM_UP, batch)
        ours.decode(2 * WARM_UP, batch)  # Compiles.
        pace = theirs.decode(WARM_UP, batch) / WARM_UP
        steps = max(WARM_UP, min(MOST_STEPS, round(args.seconds / pace)))
        for number in range(args.rounds):
            first = turn(lambda: (theirs.decode(steps, batch), 0.0))
            mine = turn(lambda: ours.decode(steps, batch))
            with ours.uncompiled():
                plain = turn(lambda: ours.decode(steps, batch))
            second = turn(lambda: (theirs.decode(steps, batch), 0.0))
            rounds.append((first, mine, plain, second))
            say(
                f"{case.name}: round {number + 1}/{args.rounds} of {steps} steps: "
                f"{over(rounds[-1], 1, 'wall'):.3f}, by CPU seconds "
                f"{over(rounds[-1], 1, 'cpu'):.3f}, not compiled "
                f"{over(rounds[-1], 2, 'cpu'):.3f} (control {second.wall / first.wall:.3f}, "
                f"{second.cpu / first.cpu:.3f})"
            )
        same = agreement(ours.tokens, theirs.tokens)
        say(f"{case.name}: {same:.0%} of the tokens are the same on both sides")
    tokens = batch * steps
    return {
        "case": case.name,
        "ratio": median(over(turns, 1, "wall") for turns in rounds),
        "worker_ratio": median(mean(turns, "wall") / turns[1].inside for turns in rounds),
        "control": median(b.wall / a.wall for a, _, _, b in rounds),
        "cpu_ratio": median(over(turns, 1, "cpu") for turns in rounds),
        "cpu_control": median(b.cpu / a.cpu for a, _, _, b in rounds),
        "plain_ratio": median(over(turns, 2, "wall") for turns in rounds),
        "plain_cpu_ratio": median(over(turns, 2, "cpu") for turns in rounds),
        "ours_tokens_per_s": median(tokens / mine.wall for _, mine, _, _ in rounds),
        "worker_tokens_per_s": median(tokens / mine.inside for _, mine, _, _ in rounds),
        "mlx_lm_tokens_per_s": median(tokens / mean(turns, "wall") for turns in rounds),
        "ratios": [round(over(turns, 1, "wall"), 4) for turns in rounds],
        "cpu_ratios": [round(over(turns, 1, "cpu"), 4) for turns in rounds],
        "contexts": list(case.lengths),
        "steps": steps,
        "same_tokens": round(same, 4),
    }


@dataclass(frozen=True)
class Turn:
    """Seconds of one side's turn, those inside our worker, and CPU seconds of the process."""

    wall: float
    inside: float
    cpu: float


Round = tuple[Turn, Turn, Turn, Turn]


def turn(decode: Callable[[], tuple[float, float]]) -> Turn:
    began = time.process_time()
    wall, inside = decode()
    return Turn(wall, inside, time.process_time() - began)


def mean(turns: Round, kind: str) -> float:
    """mlx-lm's time."""
    return float(getattr(turns[0], kind) + getattr(turns[3], kind)) / 2


def over(turns: Round, side: int, kind: str) -> float:
    """The speed of a turn of ours over mlx-lm's."""
    return mean(turns, kind) / float(getattr(turns[side], kind))


def agreement(ours: dict[str, list[int]], theirs: dict[int, list[int]]) -> float:
    """Share of tokens that are the same, up to where the shorter side has got."""
    pairs = [pair for i in theirs for pair in zip(ours[str(i)], theirs[i], strict=False)]
    return sum(a == b for a, b in pairs) / len(pairs)


def most_tokens(args: argparse.Namespace) -> int:
    """More than either side can generate in a case."""
    return int(2 * args.rounds * MOST_STEPS + 6 * WARM_UP + 8)


def median(values: Any) -> float:
    return round(statistics.median(values), 4)


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the figures depend on, without naming anybody's machine."""
    import importlib.metadata

    import mlx.core as mx

    versions = {}
    for name in ("mlx", "mlx-lm", "vllm", "torch"):
        versions[name] = importlib.metadata.version(name)
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "mlx_device": str(mx.default_device()),
        "python": platform.python_version(),
        **versions,
    }


def table(result: dict[str, Any]) -> str:
    parts = [decode_table(result["cases"])] if result["cases"] else []
    for name in ("overhead", "mixed", "prefix", "sampling"):
        for row in result.get(name, []):
            parts.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    for name in ("model", "machine"):
        parts.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in result[name].items()))
    return "\n\n".join(parts)


def decode_table(cases: list[dict[str, Any]]) -> str:
    head = (
        "| case | ratio | worker only | control | by CPU seconds | control | not compiled | "
        "ours, tokens/s | mlx-lm, tokens/s |"
    )
    lines = [head, "|" + "---|" * 9]
    for row in cases:
        names = ("ratio", "worker_ratio", "control", "cpu_ratio", "cpu_control", "plain_cpu_ratio")
        ratios = " | ".join(f"{row[name]:.2f}" for name in names)
        lines.append(
            f"| {row['case']} | {ratios} | {row['ours_tokens_per_s']:.1f} | "
            f"{row['mlx_lm_tokens_per_s']:.1f} |"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/serve",
        description="Decode tokens/s of the embedded backend over mlx-lm's BatchGenerator, and "
        "what else a step costs. Every figure is a ratio of two things that took turns.",
        epilog=PARTS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--quick", action="store_true", help="3 short rounds: a look, not a measurement")
    add(
        "--cases",
        type=lambda text: [Case.parse(name) for name in text.split(",")],
        default=[Case.parse(name) for name in DEFAULT_CASES],
        help=f"BATCHxCONTEXT[-ragged], separated by commas (default {','.join(DEFAULT_CASES)})",
    )
    add(
        "--parts",
        type=lambda text: text.split(","),
        default=[PARTS[0]],
        help=f"what to measure, separated by commas (default {PARTS[0]}); all "
        f"are {','.join(PARTS)}, and take about ten minutes",
    )
    add("--rounds", type=int, help="rounds per case: mlx-lm, ours, mlx-lm (default 7)")
    add(
        "--seconds",
        type=float,
        help=f"length of a turn (default 1); it has {WARM_UP} to {MOST_STEPS} decode steps",
    )
    add(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="of the decode part; the default is vLLM's",
    )
    for name, value in vars(Shape()).items():
        add(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick else 7)
    args.seconds = args.seconds or (0.3 if args.quick else 1.0)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.layers % 4 or args.hidden % 128 or args.vocab < 32 or args.head_dim % 8:
        parser.error("layers go in fours, hidden in 128s, head-dim in 8s; vocab from 32 on")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    import _sampling
    import _steps

    shape = Shape(**{name: getattr(args, name) for name in vars(Shape())})
    extra = most_tokens(args) + 1
    lengths = [case.lengths for case in args.cases] + [_steps.OVERHEAD]
    longest = max(max(batch) for batch in lengths) + extra
    result: dict[str, Any] = {"cases": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = write(path, shape, max(longest, _steps.LONGEST))
        batch = max(map(len, lengths))
        if "decode" in args.parts:
            ours = Ours(path, longest, batch, async_scheduling=args.async_scheduling)
            theirs = Theirs(ours.worker.get_model())
            try:
                result["cases"] = [measure(case, ours, theirs, args) for case in args.cases]
            finally:
                ours.close()
            del ours, theirs
        if "overhead" in args.parts:
            ours = Ours(path, longest, batch, async_scheduling=False)
            try:
                prompts = Case("overhead", _steps.OVERHEAD).prompts(args.vocab)
                result["overhead"] = _steps.overhead(ours, prompts, args.rounds)
            finally:
                ours.close()
            del ours
        for name in ("mixed", "prefix"):
            if name in args.parts:
                result[name] = getattr(_steps, name)(path, args.vocab, args.rounds)
    if "sampling" in args.parts:
        result["sampling"] = _sampling.measure(args.rounds)
    return result | {"model": model, "machine": machine()}


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
