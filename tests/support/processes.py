"""The processes of a server, which is the leader of a group of its own."""

from __future__ import annotations

import os
import time

import psutil


def group(leader: int) -> list[psutil.Process]:
    """Return the living processes of the group."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == leader:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def gone(leader: int, patience: float = 20) -> bool:
    """Whether no process of the group is left, soon."""
    end = time.monotonic() + patience
    while group(leader):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def engine_of(front: int) -> psutil.Process:
    """Return the engine's process, the largest of the front end's children."""
    children = psutil.Process(front).children(recursive=True)
    return max(children, key=lambda child: int(child.memory_info().rss))
