"""Run one step in a child process.

The child writes the result to a file, as JSON. A missing file means that it died.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAIN = f"from {__name__} import main; main()"
LINES = 3
"""Number of last log lines that are quoted when a child died."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a step.

    Attributes:
        found: its return value; empty if it failed.
        error: its exception, or the way the process ended; empty if it did not fail.
        kind: name of the exception, ``crash`` or ``timeout``.
    """

    found: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    kind: str = ""


def run(step: str, *arguments: str, timeout: float, **environment: str) -> Outcome:
    """Run a step of ``steps`` with this Python; end it at the timeout (seconds)."""
    with tempfile.TemporaryDirectory(prefix="vllm-moe-compat-") as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        words = [sys.executable, "-c", _MAIN, str(result), step, *arguments]
        with log.open("wb") as output:
            # A process group, since engines start processes that must be ended, too.
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                detail = f"it had not ended after {timeout:.0f} s{_last(log)}"
                return Outcome(error=detail, kind="timeout")
            finally:
                _end(process)
        if result.is_file():
            return Outcome(**json.loads(result.read_text(encoding="utf-8")))
        code = process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(error=f"its process died with {how}{_last(log)}", kind="crash")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # The whole group has ended.
    finally:
        process.wait()


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"; its last lines: {' / '.join(lines[-LINES:])}" if lines else ""


def main() -> None:
    """Run the step that the command line names and write its outcome."""
    result, step, *arguments = sys.argv[1:]
    from vllm_moe_compat.commands.doctor import steps

    try:
        outcome: dict[str, Any] = {"found": steps.STEPS[step](*arguments)}
    except Exception as error:  # noqa: BLE001 - any error is a finding
        words = " ".join(str(error).split()) or type(error).__name__
        outcome = {"error": words, "kind": type(error).__name__}
    partial = Path(f"{result}.partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.rename(result)
