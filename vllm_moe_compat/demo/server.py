"""Runs ``vllm serve`` as a child: start, wait with progress, read its log, stop.

The server gets a process group of its own, so that whatever it starts can be
found and ended with it, and Ctrl-C at the terminal reaches only this program,
which then stops it in order. Its output goes to a log file; this module knows
the form of vLLM's lines, ``(EngineCore pid=7) INFO 11-21 05:00:00 [file.py:1] text``.
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
OURS = "moe_compat: "
"""Begins every line that the plugin logs for the user of a server."""

_PREFIX = re.compile(
    r"^(?:\([^)]*pid=\d+\)\s?)?"
    r"(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d\s+\[[^\]]*\]\s?)?"
)
_LEVEL = re.compile(r"\b(INFO|WARNING|ERROR)\s+\d\d-\d\d \d\d:\d\d:\d\d")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)(?::\s|$)")


class ServerError(RuntimeError):
    """The server did not come up, died, or answered with an error."""


def message(line: str) -> str:
    """Return what a line of the log says, without process, level, time and place."""
    return _PREFIX.sub("", line.rstrip(), count=1)


def plugin_lines(log: str) -> list[str]:
    """Return what the plugin logged, each line once: several processes say the same."""
    said = (line.partition(OURS)[2].strip() for line in log.splitlines() if OURS in line)
    return list(dict.fromkeys(said))


def latest(log: str) -> str:
    """Return the last thing that vLLM logged, or an empty string."""
    for line in reversed(log.splitlines()):
        if _LEVEL.search(line) and message(line):
            return message(line)
    return ""


def errors(log: str, *, context: int = 4) -> list[str]:
    """Return the errors in a log, the root cause first, each once.

    vLLM reports a failure of the engine as a traceback there, followed by others
    that only say that the engine failed. What matters are the lines that name
    the exceptions, with what belongs to them. Without any: the last 20 lines.
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
        # Time for the engine's own clean-up when it is told to stop.
        *("--max-model-len", "2048", "--shutdown-timeout", "10", *options),
    ]


class Server:
    """A server in a subprocess, answering ``/health`` on a port of this machine."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        # The model is a folder: nothing has to be asked of the hub.
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
        """The process to end, and the id of its process group."""
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
        """Wait until the server answers; return the seconds it took.

        ``progress`` is called about four times a second with the seconds so far
        and what the server logged last.
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
        return f"{what}. It said:\n\n{own}\n\nThe whole log: {self.log_path}"

    def stop(self, patience: float = 20.0) -> bool:
        """End the server and whatever it started; say whether it went in order.

        SIGTERM goes to the server, which ends its own children. What is left of
        its process group after ``patience`` seconds is killed.
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
        except PermissionError:  # macOS says this of a group of zombies
            return False
        return True
