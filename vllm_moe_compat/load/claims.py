"""Memory that running engines will still take, seen by every process of a user.

Page pools are allocated and not touched (``backend/pages/untouched.py``), so the operating system
counts their memory as free until requests use it. A second engine must not take it once more.
Each process that holds such pools therefore keeps a file in a folder of the user's: the bytes of
its pools and its resident size at the time. What it has grown by since then is taken to be touched
pages; the rest is still to come.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from vllm_moe_compat.log import logger

_lock = threading.Lock()
_mine: dict[int, int] = {}  # Process id → bytes; a fork does not inherit its parent's claims.


def folder() -> Path:
    """Return the folder of claims of this user."""
    return Path(tempfile.gettempdir()) / f"vllm-moe-compat-{os.getuid()}" / "claims"


def claim(count: int) -> Callable[[], None]:
    """Announce ``count`` bytes that are allocated and not touched; the result takes it back."""
    pid = os.getpid()
    _add(pid, count)

    def release() -> None:
        if os.getpid() == pid:  # Not in a fork, which would delete its parent's claim.
            _add(pid, -count)

    return release


def outstanding() -> int:
    """Return the bytes that all engines of this user have claimed and not yet touched."""
    try:
        if folder().stat().st_uid != os.getuid():
            return 0
        files = list(folder().iterdir())
    except OSError:  # Nobody has claimed anything, or could.
        return 0
    return sum(_untouched(file) for file in files)


def _add(pid: int, count: int) -> None:
    import psutil

    me = psutil.Process(pid)
    with _lock:
        _mine[pid] = max(0, _mine.get(pid, 0) + count)
        file = folder() / str(pid)
        # Of the earlier claims only what is still untouched is to come.
        rest = max(0, (_untouched(file) if file.exists() else 0) + count)
        record = {"bytes": rest, "resident": me.memory_info().rss, "started": me.create_time()}
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            written = file.with_name(f".{pid}")
            written.write_text(json.dumps(record))
            written.replace(file)
            if not _mine[pid]:
                file.unlink()
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): other engines on this machine do not see the %.1f MiB "
                "that this one will take",
                file,
                error.strerror,
                rest / 2**20,
            )


def _untouched(file: Path) -> int:
    """Return what is left of a claim; one of a process that has ended is deleted."""
    import psutil

    if not file.name.isdigit():
        return 0
    try:
        record = json.loads(file.read_text())
        process = psutil.Process(int(file.name))
        if process.create_time() == record["started"]:
            grown: int = process.memory_info().rss - record["resident"]
            rest: int = record["bytes"] - max(0, grown)
            return max(0, rest)
    except (psutil.NoSuchProcess, FileNotFoundError):
        pass
    with contextlib.suppress(FileNotFoundError):
        file.unlink()
    return 0
