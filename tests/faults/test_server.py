"""Faults around a running server. Each is done to a real one; in this order, on the same one.

What vLLM does by itself is part of what is promised: a release that stops doing it is noticed here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.processes import engine_of, gone, group
from support.server import Server, start, stop, wait
from support.small_disk import MOUNT, beside_disk

pytestmark = [pytest.mark.serve, pytest.mark.full, pytest.mark.timeout(600)]


class Victim:
    """A server on a copy of the demo checkpoint, with a folder of its own for temporary files."""

    def __init__(self, folder: Path, demo_path: Path) -> None:
        self.checkpoint, self.temporary = folder / "checkpoint", folder / "tmp"
        shutil.copytree(demo_path, self.checkpoint)
        self.temporary.mkdir()
        golden = json.loads((demo_path / "golden.json").read_text())
        self.text = golden["text"]
        self.question = {"model": "demo", "temperature": 0} | {
            name: golden[name] for name in ("prompt", "max_tokens")
        }
        self.server: Server = start(
            self.checkpoint, folder / "log", env={"TMPDIR": str(self.temporary)}
        )
        wait(self.server)
        self.engine = engine_of(self.server.process.pid)

    def answers(self) -> bool:
        """Whether the known question has its known answer."""
        answer = self.server.request("/v1/completions", self.question)
        return bool(answer["choices"][0]["text"] == self.text)

    def long_request(self) -> Any:
        """The answer to a request that takes seconds, or its error."""
        body = self.question | {"max_tokens": 900, "ignore_eos": True}
        return self.server.status("/v1/completions", body)


@pytest.fixture(scope="module")
def victim(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(tmp_path_factory.mktemp("victim"), demo_path)
    yield victim
    stop(victim.server)
    assert gone(victim.server.process.pid)


def quiet(server: Server, seconds: float = 60) -> bool:
    """Whether no request runs any more, soon."""
    end = time.monotonic() + seconds
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.2)
    return server.metric("vllm:num_requests_running") == 0


def test_an_engine_that_was_stopped_goes_on(victim: Victim) -> None:
    assert victim.answers()
    victim.engine.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(victim.answers)
        time.sleep(3)
        # The front end is another process, and does not wait for the engine.
        assert victim.server.request("/health", timeout=10) == ""
        assert not answer.done()
        victim.engine.send_signal(signal.SIGCONT)
        assert answer.result(60)


def connect(server: Server, text: bytes, receive: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    client.connect(("127.0.0.1", server.port))
    client.sendall(text)
    return client


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def test_clients_that_send_half_a_request_or_never_read(victim: Victim) -> None:
    server = victim.server
    front = psutil.Process(server.process.pid)
    files = front.num_fds()
    whole = post(victim.question)
    clients = [connect(server, whole[: 20 + 6 * number]) for number in range(30)]
    # Streams that fill the socket's buffers, since nobody reads them.
    long = victim.question | {"max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 5}
    clients += [connect(server, post(long), receive=2048) for _ in range(4)]
    assert victim.answers()
    assert quiet(server), "an unread answer ends all the same"
    for client in clients:
        client.close()
    end = time.monotonic() + 20
    while front.num_fds() > files and time.monotonic() < end:
        time.sleep(0.2)
    assert front.num_fds() <= files
    assert victim.answers()


def test_no_file_descriptors_left(victim: Victim) -> None:
    server = victim.server
    front = psutil.Process(server.process.pid)
    before = front.rlimit(psutil.RLIMIT_NOFILE)
    front.rlimit(psutil.RLIMIT_NOFILE, (front.num_fds() + 4, before[1]))
    try:
        clients = [connect(server, b"POST") for _ in range(12)]
        time.sleep(1)
        for client in clients:
            client.close()
    finally:
        front.rlimit(psutil.RLIMIT_NOFILE, before)
    assert victim.answers()


def test_a_checkpoint_deleted_while_it_is_served(victim: Victim) -> None:
    shutil.rmtree(victim.checkpoint)
    assert victim.answers()
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    assert server_text(victim.server.request("/v1/chat/completions", chat))


def server_text(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_a_killed_engine_ends_the_server(victim: Victim) -> None:
    """Requests that run get an error, and the front end exits; nothing is left but sockets."""
    server = victim.server
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(victim.long_request) for _ in range(2)]
        end = time.monotonic() + 30
        while server.metric("vllm:num_requests_running") < 2 and time.monotonic() < end:
            time.sleep(0.05)
        victim.engine.send_signal(signal.SIGKILL)
        for answer in running:
            status, error = answer.result(60)
            assert status == 500
            assert "EngineCore encountered an issue" in json.dumps(error)
    server.process.wait(60)
    assert "engine core exited unexpectedly" in server.log
    assert gone(server.process.pid)
    # MLX's kernels are a cache for the next start; the sockets are vLLM's.
    left = [path for path in victim.temporary.iterdir() if not path.is_socket()]
    assert sorted(path.name for path in left) in (["mlx"], ["mlx", f"torchinductor_{user()}"])


def user() -> str:
    import getpass

    return getpass.getuser()


def test_a_killed_front_end_ends_the_engine(demo_path: Path, tmp_path: Path) -> None:
    server = start(demo_path, tmp_path / "log")
    try:
        wait(server)
        server.process.kill()
        server.process.wait()
        assert gone(server.process.pid, patience=60)
        assert "has ended without ending the engine: the engine ends too" in server.log
        assert "worker shut down" in server.log
    finally:
        for process in group(server.process.pid):
            process.kill()


@pytest.mark.parametrize("at", ["vllm_moe_compat with", "loaded mlx_lm.models"])
def test_control_c_while_the_engine_starts(at: str, demo_path: Path, tmp_path: Path) -> None:
    # A shell that starts this suite in the background has it, and its children, ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    server = start(demo_path, tmp_path / "log")
    signal.signal(signal.SIGINT, before)
    try:
        end = time.monotonic() + 200
        while at not in server.log:
            assert server.process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(120) != 0
        assert "Application startup complete" not in server.log
        if at.startswith("loaded"):
            assert "SIGINT during the start: the engine ends" in server.log
            assert "init engine" not in server.log
        assert gone(server.process.pid, patience=60)
    finally:
        for process in group(server.process.pid):
            process.kill()


def test_folders_for_caches_and_temporary_files_that_are_read_only(
    demo_path: Path, tmp_path: Path
) -> None:
    golden = json.loads((demo_path / "golden.json").read_text())
    names = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TMPDIR")
    environment = dict.fromkeys(names, MOUNT)
    server = start(demo_path, tmp_path / "log", env=environment, prefix=beside_disk("ro"))
    try:
        wait(server)
        asked = {name: golden[name] for name in ("prompt", "max_tokens")}
        body = {"model": "demo", "temperature": 0, **asked}
        answer = server.request("/v1/completions", body)
        assert answer["choices"][0]["text"] == golden["text"]
        assert "MLX cannot keep compiled kernels in /mnt/mlx/" in server.log
    finally:
        stop(server)
    assert gone(server.process.pid)


def test_a_port_that_is_taken(demo_path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr("support.server.free_port", lambda: taken.getsockname()[1])
        server = start(demo_path, tmp_path / "log")
        timer = threading.Timer(120, server.process.kill)
        timer.start()
        try:
            assert server.process.wait() == 1
        finally:
            timer.cancel()
    assert server.log.splitlines()[-1].endswith("Address already in use")
    assert gone(server.process.pid)
