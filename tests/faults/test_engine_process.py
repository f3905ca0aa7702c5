"""The engine's process ends with its front end, and on signals while it starts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

SCRIPT = """
import multiprocessing, os, signal, sys, time

def engine():
    from vllm_moe_compat.backend.vllm.engine_process import EngineProcess

    # vLLM's handlers only take note.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: print("noted", number, flush=True))
    process = EngineProcess()
    process.starting()
    if sys.argv[1] == "started":
        process.started()
        process.started()
    print(os.getpid(), flush=True)
    while True:
        time.sleep(0.05)

child = multiprocessing.get_context("fork").Process(target=engine)
child.start()
child.join()
print("exit code", child.exitcode, flush=True)
"""


@contextmanager
def front_end(state: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process with a child that is an engine, starting or started."""
    command = [sys.executable, "-c", SCRIPT, state]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as front:
        assert front.stdout is not None
        engine = psutil.Process(int(front.stdout.readline()))
        try:
            yield front, engine
        finally:
            for process in (front, engine):
                if process.pid and psutil.pid_exists(process.pid):
                    process.kill()


@pytest.mark.parametrize("state", ["starting", "started"])
def test_it_ends_with_its_front_end(state: str) -> None:
    with front_end(state) as (front, engine):
        front.kill()
        assert psutil.wait_procs([engine], timeout=30)[1] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_while_it_starts(number: signal.Signals) -> None:
    with front_end("starting") as (front, engine):
        engine.send_signal(number)
        assert front.stdout is not None
        assert front.stdout.readline() == f"exit code {128 + number}\n"


def test_once_started_signals_are_vllms_again() -> None:
    with front_end("started") as (front, engine):
        engine.send_signal(signal.SIGINT)
        assert front.stdout is not None
        assert front.stdout.readline() == f"noted {signal.SIGINT.value}\n"
        assert engine.is_running()
