"""A real ``vllm serve`` subprocess and a plain HTTP client for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running server: its process, its address, its log so far."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def request(self, path: str, body: dict[str, Any] | None = None, timeout: float = 120) -> Any:
        """GET, or POST of JSON; the parsed answer, or its text when it is no JSON."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read().decode()
        try:
            return json.loads(text)
        except ValueError:
            return text

    def status(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and parsed error of a POST that is expected to be refused."""
        try:
            return 200, self.request(path, body)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """The chunks of a server-sent event stream."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body | {"stream": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                text = line.decode().strip()
                if text == "data: [DONE]":
                    return
                if text.startswith("data: "):
                    yield json.loads(text[6:])

    def metric(self, name: str) -> float:
        """The sum of a metric's samples in ``/metrics``."""
        lines = str(self.request("/metrics")).splitlines()
        return sum(
            float(x.rpartition(" ")[2]) for x in lines if x.startswith((name + "{", name + " "))
        )


@contextmanager
def serve(
    model: Path, log_file: Path, *arguments: str, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """``vllm serve`` on 127.0.0.1 until the block ends; then SIGTERM."""
    server = start(model, log_file, *arguments, env=env)
    try:
        wait(server)
        yield server
    finally:
        stop(server)


def start(
    model: Path,
    log_file: Path,
    *arguments: str,
    env: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Server:
    """The server's process; ``prefix`` is a command that runs it."""
    port = free_port()
    command = [
        *prefix,
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"),
        *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(32 << 20)),
        *("--shutdown-timeout", "10"),
        *arguments,
    ]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    return Server(process, port, log_file)


def wait(server: Server, timeout: float = 180) -> None:
    """Until ``/health`` answers; the server's own words if it dies first."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended:\n{server.log[-6000:]}")
        try:
            server.request("/health", timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"not healthy after {timeout} s:\n{server.log[-6000:]}")


def stop(server: Server, timeout: float = 40) -> None:
    """SIGTERM, then wait; whatever is left of its process group is killed."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
            raise AssertionError(f"no end after SIGTERM:\n{server.log[-4000:]}") from None
