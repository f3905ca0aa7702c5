"""One step in a process of its own: how it is run, and what runs it there.

``main`` there writes what the step found to a file, as JSON. No file means that the process
died.
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
"""How many of the last lines of a process that died are quoted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step.

    Attributes:
        found: what it returned; empty where it failed.
        error: what it raised, or how the process ended; empty where it did not fail.
        kind: the exception's name; ``crash`` or ``timeout`` for the process's own end.
    """

    found: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    kind: str = ""


def run(step: str, *arguments: str, timeout: float, **environment: str) -> Outcome:
    """Run a step of ``steps`` with this Python and wait for it, but not for ever."""
    with tempfile.TemporaryDirectory(prefix="vllm-moe-compat-") as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        words = [sys.executable, "-c", _MAIN, str(result), step, *arguments]
        with log.open("wb") as output:
            # A group of its own: engines have children, and all have to go.
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
                said = f"it had not ended after {timeout:.0f} s{_last(log)}"
                return Outcome(error=said, kind="timeout")
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
        return  # All have ended by themselves.
    finally:
        process.wait()


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"; the last it said: {' / '.join(lines[-LINES:])}" if lines else ""


def main() -> None:
    """Do what the command line names and write down what came of it."""
    result, step, *arguments = sys.argv[1:]
    from vllm_moe_compat.commands.doctor import steps

    try:
        outcome: dict[str, Any] = {"found": steps.STEPS[step](*arguments)}
    except Exception as error:  # noqa: BLE001 - whatever broke is the finding
        words = " ".join(str(error).split()) or type(error).__name__
        outcome = {"error": words, "kind": type(error).__name__}
    partial = Path(f"{result}.partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.rename(result)
