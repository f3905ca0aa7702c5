"""Time to first token over HTTP, over that of a plain ``mlx_lm.server`` on the same checkpoint.

Both servers run beside each other on loopback and get one request at a time, in turns: mlx_lm,
ours, mlx_lm. A request is ``/v1/completions`` with a prompt that nobody has sent before and one
token as answer, so its time is that of the first token. ``ratio`` is the median over rounds of
the mean of mlx_lm's two turns to ours; the control is the median ratio of those two to each other,
which would be 1 on a quiet machine. Both servers must count the same prompt tokens.

The checkpoint is a random Qwen3 MoE in mlx-lm's form with the demo's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _model import SoftmaxShape, write
from _serve import machine
from _server import CACHE, Server, checkpoint, free_port, request, served

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ROOM = 16


@contextmanager
def plain(model: Path) -> Iterator[Server]:
    """A plain mlx_lm.server that answers; stopped at the end."""
    port = free_port(None)
    command = [
        *(sys.executable, "-m", "mlx_lm.server", "--model", str(model)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    server = Server(command, port, CACHE / "mlx-lm-server.log")
    try:
        server.wait_ready(600, lambda seconds, line: None)
        yield server
    finally:
        server.stop()


def prompt(tokenizer: Any, tokens: int, seed: str) -> str:
    """Random words of at most that many tokens."""
    draw = random.Random(seed)
    text = ""
    while True:
        word = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(2, 6)))
        longer = f"{text} {word}" if text else word
        if len(tokenizer.encode(longer)) > tokens:
            return text
        text = longer


def first_token(server: Server, model: str, text: str) -> tuple[float, int]:
    """Seconds until the answer of one token, and the prompt tokens that the server counted."""
    body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0}
    began = time.perf_counter()
    answer = request(server, "/v1/completions", body)
    return time.perf_counter() - began, int(answer["usage"]["prompt_tokens"])


def measure(ours: Server, theirs: Server, path: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """One length of prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    turns = []
    for number in range(rounds + 1):
        # Another first word for each turn, so that no cache has the beginning.
        texts = [prompt(tokenizer, tokens, f"{tokens} {number} {turn}") for turn in range(3)]
        first, counted = first_token(theirs, str(path), texts[0])
        mine, mine_counted = first_token(ours, "demo", texts[1])
        second, _ = first_token(theirs, str(path), texts[2])
        assert abs(counted - tokens) < ROOM > abs(mine_counted - tokens), (counted, mine_counted)
        print(
            f"{tokens}: round {number}/{rounds}: {(first + second) / 2 / mine:.3f} "
            f"(control {second / first:.3f}), ours {mine * 1e3:.0f} ms",
            file=sys.stderr,
            flush=True,
        )
        if number:  # The first one warms up.
            turns.append((first, mine, second))
    return {
        "tokens": tokens,
        "ratio": median([(a + b) / 2 / m for a, m, b in turns]),
        "control": median([b / a for a, _, b in turns]),
        "ours_ms": median([m * 1e3 for _, m, _ in turns]),
        "mlx_lm_ms": median([(a + b) / 2 * 1e3 for a, _, b in turns]),
        "ours_least_ms": round(min(m for _, m, _ in turns) * 1e3, 1),
        "mlx_lm_least_ms": round(min(min(a, b) for a, _, b in turns) * 1e3, 1),
    }


def median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/ttft", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[16, 128, 512, 2048],
        help="lengths of prompts, separated by commas (default 16,128,512,2048)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="per length (default 9)")
    for name, value in vars(SoftmaxShape(vocab=512)).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    args = parser.parse_args()
    shape = SoftmaxShape(**{name: getattr(args, name) for name in vars(SoftmaxShape())})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = write(path, shape, max(args.tokens) + ROOM)
        for name in TOKENIZER:
            shutil.copy(checkpoint(None) / name, path / name)
        longest = str(max(args.tokens) + ROOM)
        options = ("--max-num-seqs", "8", "--dtype", "float32", "--max-model-len", longest)
        with plain(path) as theirs, served(path, "ttft", options) as ours:
            rows = [measure(ours, theirs, path, n, args.rounds) for n in args.tokens]
    result = {"cases": rows, "model": model, "machine": machine()}
    if args.json:
        print(json.dumps(result))
        return
    for row in rows:
        print("ttft: " + ", ".join(f"{name} {value}" for name, value in row.items()))
    for name in ("model", "machine"):
        print(f"\n{name}: " + ", ".join(f"{k} {v}" for k, v in result[name].items()))


if __name__ == "__main__":
    main()
