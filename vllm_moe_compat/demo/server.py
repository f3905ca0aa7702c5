"""Run ``vllm serve`` as a child process: start, wait, read its log, stop.

The server has a process group of its own. All its processes can be ended together, and
Ctrl-C reaches only this program, which then shuts the server down. The output goes to a
log file; the lines have vLLM's format, ``(EngineCore pid=7) INFO 11-21 05:00:00 [file.py:1] text``.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HOST = "127.0.0.1"
PLUGIN_PREFIX = "moe_compat: "
"""Prefix of every line that the plugin logs."""

_PREFIX = re.compile(
    r"^(?:\([^)]*pid=\d+\)\s?)?"
    r"(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d\s+\[[^\]]*\]\s?)?"
)
_LEVEL = re.compile(r"\b(INFO|WARNING|ERROR)\s+\d\d-\d\d \d\d:\d\d:\d\d")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)(?::\s|$)")


class ServerError(RuntimeError):
    """The server did not start, died, or answered with an error."""


def message(line: str) -> str:
    """Return the message of a log line, without process, level, time and source."""
    return _PREFIX.sub("", line.rstrip(), count=1)


def plugin_lines(log: str) -> list[str]:
    """Return the plugin's messages, each once: several processes log the same."""
    messages = (
        line.partition(PLUGIN_PREFIX)[2].strip()
        for line in log.splitlines()
        if PLUGIN_PREFIX in line
    )
    return list(dict.fromkeys(messages))


def latest(log: str) -> str:
    """Return the last message that vLLM logged, or an empty string."""
    for line in reversed(log.splitlines()):
        if _LEVEL.search(line) and message(line):
            return message(line)
    return ""


def errors(log: str, *, context: int = 4) -> list[str]:
    """Return the errors in a log, the root cause first, each once.

    vLLM logs the traceback of an engine failure, followed by tracebacks of the processes
    that noticed it. Only the lines that name an exception, with their continuation lines,
    are returned; if there are none, the last 20 lines.
    """
    lines = [message(line) for line in log.splitlines()]
    found: list[str] = []
    for number, line in enumerate(lines):
        if not _EXCEPTION.match(line) or line in found:
            continue
        found.append(line)
        for more in lines[number + 1 : number + 1 + context]:
            if not more.startswith((" ", "\t")) or more.lstrip().startswith(("File ", "^")):
                break
            found.append(more)
    return found or [line for line in log.splitlines() if line.strip()][-20:]


def free_port(wanted: int | None) -> int:
    """Return the wanted port if it is free, or any free one.

    Raises:
        ServerError: the wanted port is taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted or 0))
        except OSError as error:
            raise ServerError(f"port {wanted} on {HOST} cannot be used: {error.strerror}") from None
        return int(probe.getsockname()[1])


def serve_command(model: Path, port: int, options: Sequence[str] = ()) -> list[str]:
    """Return the command line that serves the folder as the model ``demo``."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", HOST, "--port", str(port), "--served-model-name", "demo"),
        # Time for the engine to clean up after SIGTERM.
        *("--max-model-len", "2048", "--shutdown-timeout", "10", *options),
    ]


class Server:
    """A server in a child process that answers ``/health`` on a local port."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        # The model is a local folder, so the hub is not needed.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment.setdefault("VLLM_NO_USAGE_STATS", "1")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.port = port
        self.log_path = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The id of the process and of its process group."""
        return self._process.pid

    def log(self) -> str:
        """Return everything that the server has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def check_alive(self) -> None:
        """Raise ServerError, with the server's own errors, if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerError(self._report(f"the server ended with exit code {code}"))

    def wait_ready(self, timeout: float, progress: Callable[[float, str], None]) -> float:
        """Wait until the server answers; return the elapsed seconds.

        ``progress`` is called about four times a second with the elapsed seconds and the
        last log message.
        """
        began = time.monotonic()
        while not self._healthy():
            self.check_alive()
            elapsed = time.monotonic() - began
            if elapsed > timeout:
                raise ServerError(
                    self._report(
                        f"the server does not answer after {timeout:.0f} s, and still runs"
                    )
                )
            progress(elapsed, latest(self.log()))
            time.sleep(0.25)
        return time.monotonic() - began

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _report(self, what: str) -> str:
        own = "\n".join(f"  {line}" for line in errors(self.log()))
        return f"{what}. Its errors:\n\n{own}\n\nThe whole log: {self.log_path}"

    def stop(self, patience: float = 20.0) -> bool:
        """Stop the server and all its processes; return whether SIGTERM was enough.

        After ``patience`` seconds the rest of the process group is killed.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        deadline = time.monotonic() + 5.0
        while self._process.poll() is not None and self._group_alive():
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        clean = self._process.poll() is not None and not self._group_alive()
        if not clean:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        return clean

    def _group_alive(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # macOS raises this for a group of zombies
            return False
        return True
