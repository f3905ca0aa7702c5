"""Minutes of mixed load on a real server, a tenth of it abandoned midway.

Clients ask one after the other, over HTTP, for random lengths; some prompts share a
beginning. Every tenth request or so is hung up on while it streams. Watched: the
engine's resident memory, the latencies of the first and of the last minute, and at
the end that nothing is held any more: no pages (vLLM's count), no requests and no
states (the worker's), and that a known prompt still has its known answer. It fails
when a request fails or something is held; growth and latency are for the reader.

With --mix the requests are of every kind (``_mix``), and every answer to a greedy one is
compared with the answer of the idle server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _mix
import psutil
from _server import HOST, Server, add_model, checkpoint, metric, request, served

OPTIONS = (
    *("--max-num-seqs", "16", "--max-num-batched-tokens", "256"),
    *("--enable-prefix-caching", "--kv-cache-memory-bytes", str(64 << 20)),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
# Prompt and answer tokens; the demo server takes 2,048 in all.
PROMPT, ANSWER, SHARED = (8, 700), (4, 160), 320
SAMPLE_SECONDS, PATIENCE = 2.0, 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: seconds since the start, and how long things took."""

    at: float
    first: float
    gaps: tuple[float, ...]
    abandoned: bool
    kind: str = "completion"
    whole: float = 0.0


@dataclass
class Log:
    """What all clients saw."""

    began: float = field(default_factory=time.monotonic)
    answers: list[Answer] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    # Seconds; MiB of the engine and of the front end; files that each has open; share of pages.
    samples: list[tuple[float, float, float, int, int, float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def now(self) -> float:
        return time.monotonic() - self.began


Pool = list[_mix.Question]
Known = dict[int, str]


def ask(server: Server, rng: random.Random, vocab: int, aborts: float, log: Log) -> None:
    """One streamed request, perhaps abandoned after some tokens."""
    prompt = [rng.randrange(3, vocab) for _ in range(rng.randint(*PROMPT))]
    if rng.random() < 0.3:  # the same beginning as others
        prompt = [3 + i % (vocab - 3) for i in range(SHARED)] + prompt[:64]
    wanted = rng.randint(*ANSWER)
    abandon_after = rng.randint(1, wanted) if rng.random() < aborts else None
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": wanted,
        "ignore_eos": True,
        "stream": True,
        "temperature": rng.choice([0.0, 0.0, 0.8]),
    }
    began, at, previous, gaps = time.monotonic(), log.now, None, []
    first = 0.0
    connection = http.client.HTTPConnection(HOST, server.port, timeout=300)
    try:
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise http.client.HTTPException(f"status {answer.status}: {answer.read()[:300]!r}")
        ended = False
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                ended = True
                break
            now = time.monotonic()
            if previous is None:
                first = now - began
            else:
                gaps.append(now - previous)
            previous = now
            if abandon_after is not None and len(gaps) + 1 >= abandon_after:
                break
        if not ended and abandon_after is None:
            raise http.client.HTTPException("the stream broke off")
        with log.lock:
            log.answers.append(Answer(at, first, tuple(gaps), abandoned=not ended))
    except (OSError, http.client.HTTPException) as error:
        with log.lock:
            log.faults.append(f"{at:.0f} s: {error!r}")
    finally:
        connection.close()


def engine(server: Server) -> psutil.Process:
    """The process that holds the model: the largest of the server's children."""
    children = psutil.Process(server.pid).children(recursive=True)
    return max(children, key=lambda child: int(child.memory_info().rss))


def ask_of_the_mix(
    server: Server, rng: random.Random, pool: Pool, known: Known, aborts: float, log: Log
) -> None:
    """One request of any kind, its answer compared."""
    at = log.now
    try:
        kind, first, whole, gaps, abandoned = _mix.ask(server, pool, known, rng, aborts)
        with log.lock:
            log.answers.append(Answer(at, first, tuple(gaps), abandoned, kind, whole))
    except (OSError, http.client.HTTPException, _mix.WrongAnswerError) as error:
        with log.lock:
            log.faults.append(f"{at:.0f} s: {error!r}")


def load(server: Server, vocab: int, args: argparse.Namespace) -> Log:
    """Clients at work for ``args.seconds``, and memory, open files and pages meanwhile."""
    pool = _mix.questions(vocab, args.seed) if args.mix else []
    known = _mix.known_answers(server, pool)
    log, process, front = Log(), engine(server), psutil.Process(server.pid)

    def client(number: int) -> None:
        rng = random.Random(args.seed * 1000 + number)
        while log.now < args.seconds and len(log.faults) < 20:
            if pool:
                ask_of_the_mix(server, rng, pool, known, args.aborts, log)
            else:
                ask(server, rng, vocab, args.aborts, log)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(args.clients)]
    for thread in clients:
        thread.start()
    while any(thread.is_alive() for thread in clients):
        server.check_alive()
        log.samples.append(
            (
                log.now,
                process.memory_info().rss / 2**20,
                front.memory_info().rss / 2**20,
                process.num_fds(),
                front.num_fds(),
                metric(server, "vllm:kv_cache_usage_perc"),
            )
        )
        time.sleep(SAMPLE_SECONDS)
    return log


def left_over(server: Server) -> dict[str, Any]:
    """What is still held once everybody has gone; waits for the engine to notice."""
    end = time.monotonic() + PATIENCE
    while True:
        (worker,) = request(server, "/collective_rpc", {"method": "occupancy"})["results"]
        held = {
            "running": metric(server, "vllm:num_requests_running"),
            "waiting": metric(server, "vllm:num_requests_waiting"),
            "page_share": metric(server, "vllm:kv_cache_usage_perc"),
            **(worker if isinstance(worker, dict) else json.loads(worker)),
        }
        if not any(held.values()) or time.monotonic() > end:
            return held
        time.sleep(0.5)


def window(log: Log, start: float, end: float) -> dict[str, Any]:
    """Latencies of the answers that were asked for from ``start`` to ``end``, ms; memory."""
    answers = [a for a in log.answers if start <= a.at < end and not a.abandoned]
    samples = [sample[1:] for sample in log.samples if start <= sample[0] < end]
    names = ("resident_mib", "front_end_mib", "engine_files", "front_end_files", "page_share")
    middles = [round(statistics.median(values), 3) for values in zip(*samples, strict=True)]
    return {
        "answers": len(answers),
        "first_token_ms": percentiles([a.first for a in answers if a.gaps]),
        "between_tokens_ms": percentiles([gap for a in answers for gap in a.gaps]),
        **dict(zip(names, middles, strict=False)),
    }


def by_kind(log: Log) -> dict[str, Any]:
    """Number of complete answers of each kind, and milliseconds until they were complete."""
    whole: dict[str, list[float]] = {}
    for answer in log.answers:
        if not answer.abandoned:
            whole.setdefault(answer.kind, []).append(answer.whole)
    return {
        kind: {"answers": len(took), **percentiles(took)} for kind, took in sorted(whole.items())
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """50, 95 and 99 in milliseconds."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": round(1000 * cuts[p - 1], 1) for p in (50, 95, 99)}


def known_answer(server: Server, model: Path) -> bool | None:
    """Whether the demo's prompt has its answer; None for a model without one."""
    path = model / "golden.json"
    if not path.exists():
        return None
    golden = json.loads(path.read_text())
    body = {"model": "demo", "temperature": 0}
    body |= {name: golden[name] for name in ("prompt", "max_tokens")}
    answer = request(server, "/v1/completions", body)
    return bool(answer["choices"][0]["text"] == golden["text"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench/soak", description=__doc__)
    add_model(parser)
    parser.add_argument("--seconds", type=float, default=600, help="of load (default 600)")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--mix", action="store_true", help="requests of every kind, compared")
    parser.add_argument("--clients", type=int, default=8, help="at once (default 8)")
    parser.add_argument("--aborts", type=float, default=0.1, help="share hung up on (default 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.minutes is not None:
        args.seconds = 60 * args.minutes
    model = checkpoint(args.model)
    config = json.loads((model / "config.json").read_text())
    vocab = config.get("text_config", config)["vocab_size"]
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # for /collective_rpc
    with served(model, "soak", OPTIONS) as server:
        log = load(server, vocab, args)
        held = left_over(server)
        right = known_answer(server, model)
        preemptions = metric(server, "vllm:num_preemptions_total")
        hits = metric(server, "vllm:prefix_cache_hits_total")
    span = min(60.0, args.seconds / 3)
    done = [answer for answer in log.answers if not answer.abandoned]
    result = {
        "seconds": args.seconds,
        "clients": args.clients,
        "completed": len(done),
        "abandoned": len(log.answers) - len(done),
        "faults": log.faults,
        "tokens": sum(len(answer.gaps) + 1 for answer in log.answers),
        "preemptions": int(preemptions),
        "tokens_from_prefix_cache": int(hits),
        "first": window(log, 0, span),
        "last": window(log, args.seconds - span, args.seconds),
        "most_resident_mib": round(max(sample[1] for sample in log.samples), 1),
        "most_files": max(max(sample[3:5]) for sample in log.samples),
        "most_page_share": round(max(sample[5] for sample in log.samples), 3),
        "held_at_the_end": held,
        "known_answer": right,
    }
    if args.mix:
        result["whole_answer_ms"] = by_kind(log)
    good = not log.faults and not any(held.values()) and right is not False
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:26} {value}")
        print("nothing is held, nothing failed" if good else "FAILED", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
