"""What a step costs beside the forward pass: overhead, chunks, a cold prefix.

``overhead``: the worker's Python while MLX has nothing to do. A decode step's time
from the worker's first line to the evaluation, and from the end of the evaluation to
the worker's last; the median over steps. What is built while MLX works is not in it.

``mixed``: 8 requests decode while a prompt arrives in chunks of 64 tokens. Each round
has the chunks alone, the decodes alone and both, and compares their medians.

``prefix``: each round draws 2,048 tokens, sends them with 64 more (cold), and again
with 64 others (shared); both prompts are computed for real.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _contexts import draw
from _engine import Ours

OVERHEAD = (1024,) * 16
PREFIX, SUFFIX = 2048, 64
DECODES, CHUNK, CHUNKS, BEHIND = 8, 64, 3, 256
LONGEST = PREFIX + SUFFIX + 16
STEPS, MOST_PREFIXES = 6, 3


def overhead(ours: Ours, prompts: list[list[int]], rounds: int) -> list[dict[str, Any]]:
    """One row: overhead in ms, the step's, and their ratio."""
    contexts = [draw(ours.layers, len(prompt) - 1, i) for i, prompt in enumerate(prompts)]
    waits: list[float] = []
    steps: list[float] = []
    # Who is let in first is some tokens ahead of who is last.
    with ours.running(prompts, contexts, 4 + len(prompts) + STEPS * rounds):
        del contexts
        ours.decode(2, len(prompts))
        with _waits(ours, waits, steps):
            ours.decode(STEPS * rounds, len(prompts))
    row = {"case": f"{len(prompts)}x{len(prompts[0])}", "steps": len(waits)}
    exposed, step = statistics.median(waits), statistics.median(steps)
    return [
        row
        | {
            "overhead_ms": round(exposed * 1e3, 3),
            "step_ms": round(step * 1e3, 2),
            "ratio": round(exposed / step, 4),
        }
    ]


@contextmanager
def _waits(ours: Ours, waits: list[float], steps: list[float]) -> Iterator[None]:
    """Note, of each step, the seconds outside its evaluation, and all of them."""
    import mlx.core as mx

    worker = ours.worker
    real = mx.eval, mx.async_eval
    before = worker.execute_model, worker.sample_tokens
    marks: dict[str, float] = {}

    def evaluating(function: Any) -> Any:
        def evaluate(*arrays: Any) -> None:
            marks.setdefault("first", time.perf_counter())
            function(*arrays)
            marks["last"] = time.perf_counter()

        return evaluate

    def execute_model(scheduled: Any) -> Any:
        marks.clear()
        marks["begin"] = time.perf_counter()
        return before[0](scheduled)

    def sample_tokens(grammar: Any) -> Any:
        result = before[1](grammar)
        end = time.perf_counter()
        waits.append(marks["first"] - marks["begin"] + end - marks["last"])
        steps.append(end - marks["begin"])
        return result

    mx.eval, mx.async_eval = evaluating(real[0]), evaluating(real[1])
    worker.execute_model, worker.sample_tokens = execute_model, sample_tokens
    try:
        yield
    finally:
        mx.eval, mx.async_eval = real
        worker.execute_model, worker.sample_tokens = before


def mixed(path: Path, vocab: int, rounds: int) -> list[dict[str, Any]]:
    """One row: a mixed step over the sum of its parts, by the worker's time."""
    ours = Ours(path, 1024, DECODES + 1, async_scheduling=False)
    try:
        found = [_mixed_round(ours, vocab, number) for number in range(rounds + 1)][1:]
    finally:
        ours.close()
    ratios = [both / (decodes + chunk) for decodes, chunk, both in found]
    names = ("decodes_ms", "chunk_ms", "both_ms")
    parts = {
        name: round(statistics.median(column) * 1e3, 2)
        for name, column in zip(names, zip(*found, strict=True), strict=True)
    }
    row = {"case": f"{DECODES} decodes + {CHUNK} tokens", "ratio": _median(ratios)}
    return [row | parts | {"ratios": [round(ratio, 4) for ratio in ratios]}]


def _mixed_round(ours: Ours, vocab: int, number: int) -> tuple[float, float, float]:
    """Seconds of the decodes, of a chunk, and of both in one step."""
    # Neither of the two prompts ends within the steps that are timed.
    late = [_prompt(vocab, CHUNK * (CHUNKS + 1) + 1, f"late {number} {i}") for i in range(2)]
    ours.budget(CHUNK)
    ids = [ours.add("alone", late[0])]
    ours.worker_seconds()
    chunk = statistics.median(ours.worker_seconds() for _ in range(CHUNKS))
    ours.drop(ids)
    ours.budget(4096)
    prompts = [[i, *_prompt(vocab, BEHIND - 1, f"{number} {i}")] for i in range(DECODES)]
    contexts = [draw(ours.layers, BEHIND - 1, i) for i in range(DECODES)]
    with ours.running(prompts, contexts, 8 + DECODES + 3 * CHUNKS):
        ours.worker_seconds()
        decodes = statistics.median(ours.worker_seconds() for _ in range(CHUNKS))
        ours.budget(CHUNK + DECODES)
        ids = [ours.add("beside", late[1])]
        ours.worker_seconds()
        both = statistics.median(ours.worker_seconds() for _ in range(CHUNKS))
        ours.engine.abort_request(ids, internal=True)
    return decodes, chunk, both


def prefix(path: Path, vocab: int, rounds: int) -> list[dict[str, Any]]:
    """One row: time to first token with a shared prefix over that without.

    vLLM keeps the states of a prefix when a second prompt turns out to share it,
    so it is the third that has them.
    """
    ours = Ours(path, LONGEST, 1, enable_prefix_caching=True)
    try:
        _first_token(ours, _prompt(vocab, SUFFIX, "warm up"))
        found = []
        for number in range(min(rounds, MOST_PREFIXES)):
            shared = _prompt(vocab, PREFIX, f"shared {number}")
            cold, cached = _first_token(ours, shared + _prompt(vocab, SUFFIX, f"a {number}"))
            assert not cached, "a prompt that nobody has sent is in the cache"
            _first_token(ours, shared + _prompt(vocab, SUFFIX, f"b {number}"))
            warm, cached = _first_token(ours, shared + _prompt(vocab, SUFFIX, f"c {number}"))
            assert cached, "nothing of a prefix that was just computed is in the cache"
            found.append((warm, cold, cached))
    finally:
        ours.close()
    return [
        {
            "case": f"{PREFIX} shared + {SUFFIX} tokens",
            "ratio": _median([warm / cold for warm, cold, _ in found]),
            "shared_ms": round(statistics.median(warm for warm, _, _ in found) * 1e3, 1),
            "cold_ms": round(statistics.median(cold for _, cold, _ in found) * 1e3, 1),
            "cached_tokens": found[-1][2],
        }
    ]


def _first_token(ours: Ours, prompt: list[int]) -> tuple[float, int]:
    """Seconds until the first token, and how much of the prompt was cached."""
    began = time.perf_counter()
    ours.add("first", prompt)
    while True:
        for output in ours.engine.step():
            if output.outputs[0].token_ids:
                seconds = time.perf_counter() - began
                ours.drop([])
                return seconds, output.num_cached_tokens or 0


def _prompt(vocab: int, length: int, seed: str) -> list[int]:
    """Token ids that are nobody's number (see ``_contexts``)."""
    draw_one = random.Random(seed).randrange
    return [draw_one(vocab // 2, vocab - 16) for _ in range(length)]


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)
