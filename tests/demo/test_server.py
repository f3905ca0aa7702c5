"""The child server: its log is understood, its death noticed, nothing of it survives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from vllm_moe_compat.demo import serve, server

# From a real run, shortened.
LOG = """\
INFO 11-21 05:24:11 [api_server.py:1205] vLLM API server version 0.32.0
(APIServer pid=11) INFO 11-21 05:24:12 [execute.py:55] moe_compat: stacked 96 expert tensors
(EngineCore pid=12) INFO 11-21 05:24:13 [execute.py:55] moe_compat: stacked 96 expert tensors
(EngineCore pid=12) INFO 11-21 05:24:13 [platform.py:9] moe_compat: the embedded platform serves
(EngineCore pid=12) ERROR 11-21 05:24:14 [core.py:1100] EngineCore failed to start.
(EngineCore pid=12) ERROR 11-21 05:24:14 [core.py:1100] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-21 05:24:14 [core.py:1100]   File "core.py", line 1, in run
(EngineCore pid=12) ERROR 11-21 05:24:14 [core.py:1100]     raise LayoutError(text)
(EngineCore pid=12) ERROR 11-21 05:24:14 [core.py:1100] vllm_moe_compat.errors.LayoutError: a gap
(EngineCore pid=12) Traceback (most recent call last):
(EngineCore pid=12) vllm_moe_compat.errors.LayoutError: a gap
(APIServer pid=11) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=11)   Value error, Invalid repository ID [type=value_error]
(APIServer pid=11) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_log_lines_lose_process_level_time_and_place():
    assert server.message(LOG.splitlines()[0]) == "vLLM API server version 0.32.0"
    assert server.message("(EngineCore pid=3) INFO 11-21 05:24:13 [a.py:1] text") == "text"
    assert server.message("  plain text (pid=3)\n") == "  plain text (pid=3)"


def test_what_the_plugin_says_is_listed_once_in_order():
    assert server.plugin_lines(LOG) == ["stacked 96 expert tensors", "the embedded platform serves"]


def test_latest_is_the_last_logged_message():
    assert (
        server.latest("\n".join(LOG.splitlines()[:4])) == "moe_compat: the embedded platform serves"
    )
    assert server.latest("") == ""


def test_errors_begin_with_the_root_cause_and_repeat_nothing():
    assert server.errors(LOG) == [
        "vllm_moe_compat.errors.LayoutError: a gap",
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, Invalid repository ID [type=value_error]",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]


def test_without_an_exception_the_end_of_the_log_is_shown():
    log = "\n".join(f"line {n}" for n in range(40)) + "\nvllm serve: error: bad option\n"
    assert server.errors(log)[-1] == "vllm serve: error: bad option"
    assert len(server.errors(log)) == 20


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        with pytest.raises(server.ServerError, match="cannot be used"):
            server.free_port(taken.getsockname()[1])


# A server of a few lines, so that what vLLM rarely does can be seen: it answers
# /health, streams, and has a child or misbehaves as its argument says.
STAND_IN = """
import http.server, json, os, signal, subprocess, sys, time
port, manner = int(sys.argv[1]), sys.argv[2]
if manner == "dies":
    sys.exit("ValueError: cannot start")
if manner in ("parent", "deaf"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
if manner == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if manner == "hangs":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if manner == "refuses":
            self.send_response(400); self.end_headers(); self.wfile.write(b"too long"); return
        self.send_response(200); self.end_headers()
        for text in ("a", "b\\n", "c"):
            chunk = {"choices": [{"text": text}]}
            if manner == "breaks" and text == "c":
                chunk = {"error": {"message": "engine dead"}}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(manner: str) -> server.Server:
        port = server.free_port(None)
        command = [sys.executable, "-c", textwrap.dedent(STAND_IN), str(port), manner]
        started.append(server.Server(command, port, tmp_path / "log"))
        return started[-1]

    yield begin
    for one in started:
        one.stop(patience=0)


def silent(elapsed: float, text: str) -> None:
    pass


def child_of(one: server.Server) -> int:
    while "child" not in one.log():
        time.sleep(0.05)
    return int(one.log().split()[1])


def runs(pid: int) -> bool:
    """Whether a process lives; one that ended and was not collected does not."""
    shown = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip()[:1] not in ("", "Z")


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not runs(pid)


def test_an_answer_is_streamed(start):
    one = start("well")
    assert one.wait_ready(30, silent) < 30
    assert list(serve.stream_completion(one, "x", 3)) == ["a", "b\n", "c"]


@pytest.mark.parametrize(
    ("manner", "said"), [("refuses", "400: too long"), ("breaks", "engine dead")]
)
def test_a_failed_request_shows_what_the_server_says(start, manner, said):
    one = start(manner)
    one.wait_ready(30, silent)
    with pytest.raises(server.ServerError, match=said):
        list(serve.stream_completion(one, "x", 3))


def test_a_server_that_dies_is_noticed_at_once_with_its_own_words(start):
    one = start("dies")
    began = time.monotonic()
    with pytest.raises(server.ServerError, match=r"exit code 1[\s\S]*ValueError: cannot start"):
        one.wait_ready(300, silent)
    assert time.monotonic() - began < 30


def test_a_server_that_hangs_is_reported_after_the_timeout(start):
    with pytest.raises(server.ServerError, match="does not answer after 1 s"):
        start("hangs").wait_ready(1, silent)


@pytest.mark.parametrize("manner", [pytest.param("parent", marks=pytest.mark.full), "deaf"])
def test_no_child_survives_the_stop(start, manner):
    one = start(manner)
    one.wait_ready(30, silent)
    child = child_of(one)
    one.stop(patience=1)
    assert gone(child)
    assert gone(one.pid)


@pytest.mark.full
@pytest.mark.serve
def test_the_demo_shows_the_servers_own_error(demo_checkpoint, tmp_path):
    command = [sys.executable, "-m", "vllm_moe_compat.demo.serve"]
    command += ["--checkpoint", str(demo_checkpoint.path), "--log", str(tmp_path / "log")]
    ran = subprocess.run(
        [*command, "--", "--no-such-option"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"VLLM_MOE_COMPAT_BACKEND": "embedded"},
    )
    assert ran.returncode == 1
    assert "no-such-option" in ran.stderr
    assert str(tmp_path / "log") in ran.stderr


@pytest.mark.serve
def test_ending_the_demo_ends_its_server(demo_checkpoint, tmp_path):
    command = [sys.executable, "-m", "vllm_moe_compat.demo.serve"]
    command += ["--checkpoint", str(demo_checkpoint.path), "--log", str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("Starting"):
                break
        time.sleep(1)
        listing = ["ps", "-o", "pid=", "--ppid", str(demo.pid)]
        servers = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
        demo.send_signal(signal.SIGTERM)
        demo.stdout.read()
        assert demo.wait(60) == 128 + signal.SIGTERM
    assert servers
    assert all(gone(int(pid)) for pid in servers)
