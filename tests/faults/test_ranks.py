"""Ranks of a real server that are lost, on one machine and on two."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.processes import gone, group
from support.server import Server, free_port, start, stop, wait

pytestmark = [pytest.mark.serve, pytest.mark.full, pytest.mark.timeout(900)]

SOON = 20.0
"""Seconds from a rank's death to the end of the last process, beside other work."""
AFTER_SILENCE = 60.0 + SOON
PATIENCE = 500.0
"""Seconds for a server of several processes to start, beside other work."""
TWO = ("--tensor-parallel-size", "2")


@contextmanager
def _ended(*servers: Server) -> Iterator[None]:
    try:
        yield
    finally:
        for server in servers:
            stop(server)
            for process in group(server.process.pid):
                process.kill()


def _rank(server: Server, number: int) -> psutil.Process:
    (found,) = (
        process
        for process in group(server.process.pid)
        if f"Worker_TP{number}" in " ".join([process.name(), *process.cmdline()])
    )
    return found


def _question(demo_path: Path) -> tuple[dict[str, Any], str]:
    golden = json.loads((demo_path / "golden.json").read_text())
    asked = {name: golden[name] for name in ("prompt", "max_tokens")}
    return {"model": "demo", "temperature": 0} | asked, golden["text"]


def _answers(server: Server, demo_path: Path) -> bool:
    question, text = _question(demo_path)
    answer = server.request("/v1/completions", question)
    return bool(answer["choices"][0]["text"] == text)


def _lose(server: Server, rank: psutil.Process, how: signal.Signals, demo_path: Path) -> int:
    """Send a signal to a rank in the middle of a long request; return the request's status."""
    question, _ = _question(demo_path)
    body = question | {"max_tokens": 900, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.status, "/v1/completions", body)
        end = time.monotonic() + 60
        while server.metric("vllm:num_requests_running") != 1 and time.monotonic() < end:
            time.sleep(0.05)
        rank.send_signal(how)
        return int(answer.result()[0])


@pytest.mark.parametrize(
    ("number", "how", "patience", "words"),
    [
        (1, signal.SIGKILL, SOON, "has ended"),
        (0, signal.SIGKILL, SOON, "has ended"),
        (1, signal.SIGSTOP, AFTER_SILENCE, "has said nothing for 60 seconds"),
    ],
    ids=["killed", "the first is killed", "stopped"],
)
def test_a_lost_rank_ends_the_server_with_its_name(
    demo_path: Path,
    tmp_path: Path,
    number: int,
    how: signal.Signals,
    patience: float,
    words: str,
) -> None:
    server = start(demo_path, tmp_path / "log", *TWO)
    with _ended(server):
        wait(server, PATIENCE)
        assert _answers(server, demo_path)
        listening = {
            one.laddr.ip
            for process in map(_rank, [server] * 2, [0, 1])
            for one in process.net_connections()
            if one.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        rank = _rank(server, number)
        assert _lose(server, rank, how, demo_path) == 500
        assert gone(server.process.pid, patience)
        assert f"rank {number} (process {rank.pid} on 127.0.0.1) {words}" in server.log


@pytest.mark.parametrize("who", ["front end", "engine"])
def test_no_rank_outlives(who: str, demo_path: Path, tmp_path: Path) -> None:
    server = start(demo_path, tmp_path / "log", *TWO)
    with _ended(server):
        wait(server, PATIENCE)
        engine = _rank(server, 0).parent()
        assert engine is not None
        killed = engine if who == "engine" else psutil.Process(server.process.pid)
        killed.kill()
        server.process.wait(SOON)
        assert gone(server.process.pid, SOON)


def test_two_commands_on_two_machines_serve_one_model(demo_path: Path, tmp_path: Path) -> None:
    port = str(free_port())
    many = (*TWO, "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    env = {**os.environ, "VLLM_HOST_IP": "127.0.0.1"}
    first = start(demo_path, tmp_path / "first", *many, "--node-rank", "0", env=env)
    headless = ("--node-rank", "1", "--headless")
    second = start(demo_path, tmp_path / "second", *many, *headless, env=env)
    with _ended(first, second):
        wait(first, PATIENCE)
        assert _answers(first, demo_path)
        rank = _rank(second, 1)
        assert _lose(first, rank, signal.SIGKILL, demo_path) == 500
        assert gone(first.process.pid, SOON)
        assert gone(second.process.pid, SOON)
        assert f"rank 1 (process {rank.pid} on 127.0.0.1) has ended" in first.log
