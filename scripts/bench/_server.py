"""A real ``vllm serve`` for the benchmarks that go over HTTP."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_moe_compat import demo
from vllm_moe_compat.demo.server import HOST, Server, free_port, serve_command

CACHE = Path(__file__).resolve().parents[2] / ".cache"


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options about what is served."""
    parser.add_argument(
        "--model", type=Path, help="a checkpoint with a tokenizer; default: the demo checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def checkpoint(path: Path | None) -> Path:
    """The checkpoint to serve; the demo's is made when it is not there."""
    return path if path is not None else Path(demo.build(CACHE / "demo").path)


@contextmanager
def served(model: Path, name: str, options: Sequence[str]) -> Iterator[Server]:
    """A server that answers, with its log in ``.cache/NAME-server.log``; stopped at the end."""
    port = free_port(None)
    command = serve_command(model, port, options)
    server = Server(command, port, CACHE / f"{name}-server.log")
    try:
        took = server.wait_ready(600, lambda seconds, line: None)
        print(f"served on port {port} after {took:.0f} s", file=sys.stderr)
        yield server
    finally:
        server.stop()


def request(server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST of JSON; the parsed answer, or its text."""
    asked = urllib.request.Request(
        f"http://{HOST}:{server.port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=300) as answer:
        text = answer.read().decode()
    try:
        return json.loads(text)
    except ValueError:
        return text


def metric(server: Server, name: str) -> float:
    """The sum of a metric's samples."""
    lines = str(request(server, "/metrics")).splitlines()
    samples = [line for line in lines if line.startswith((name + "{", name + " "))]
    if not samples:
        raise LookupError(f"/metrics has no {name}")
    return sum(float(line.rpartition(" ")[2]) for line in samples)
