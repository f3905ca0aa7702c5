"""Memory that running engines will still take, seen by every process of a user.

Page pools are allocated and not touched (``backend/pages/untouched.py``), so the operating system
counts their memory as free until requests use it. A second engine must not take it once more.

What this process has claimed and not touched is known exactly. For the others, each process with
claims keeps a file in a folder of the user's: the bytes that were untouched when it was written,
and the resident size at the time. What the process has grown by since then is taken to be touched
pages, and the rest is still to come.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_compat.log import logger


@dataclass(frozen=True, eq=False, slots=True)
class _Claim:
    """``count`` bytes of memory at ``address``, of the process ``pid``."""

    pid: int
    address: int
    count: int


# A collection may release a claim while this thread writes another one.
_lock = threading.RLock()
_claims: set[_Claim] = set()


def folder() -> Path:
    """Return the folder of claims of this user."""
    return Path(tempfile.gettempdir()) / f"vllm-moe-compat-{os.getuid()}" / "claims"


def claim(address: int, count: int) -> Callable[[], None]:
    """Announce ``count`` bytes of untouched memory at ``address``; the result takes it back."""
    mine = _Claim(os.getpid(), address, count)
    with _lock:
        _claims.add(mine)
        _write()

    def release() -> None:
        # A fork has its parent's claims in memory, and they are not its own.
        if os.getpid() == mine.pid:
            with _lock:
                _claims.discard(mine)
                _write()

    return release


def outstanding() -> int:
    """Return the bytes that all engines of this user have claimed and not yet touched."""
    mine = str(os.getpid())
    try:
        _check_owner()
        files = list(folder().iterdir())
    except OSError:  # Nobody has claimed anything, or could.
        return own()
    return own() + sum(_of_other(file) for file in files if file.name != mine)


def _check_owner() -> None:
    """Check that the folders are this user's: anyone may make them in the temporary folder first.

    Raises:
        PermissionError: they are another user's.
        FileNotFoundError: there are none.
    """
    for made in (folder().parent, folder()):
        if made.lstat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "the folder belongs to another user", str(made))


def own() -> int:
    """Return the bytes that this process has claimed and not yet touched."""
    pid = os.getpid()
    return sum(one.count - _touched(one) for one in list(_claims) if one.pid == pid)


def _touched(one: _Claim) -> int:
    """Return how many bytes of a claim are resident."""
    start = -(-one.address // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = max(0, one.address + one.count - start) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * max(1, pages))()
    where = (ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE))
    if ctypes.CDLL(None).mincore(*where, found):
        return 0  # The memory was given back: its owner is about to say so.
    return bytes(found).count(1) * mmap.PAGESIZE


def _write() -> None:
    """Write this process's file, or delete it if nothing is claimed."""
    import psutil

    rest, me = own(), psutil.Process()
    record = {"bytes": rest, "resident": me.memory_info().rss, "started": me.create_time()}
    file = folder() / str(me.pid)
    try:
        for made in (file.parent.parent, file.parent):
            made.mkdir(mode=0o700, exist_ok=True)
        _check_owner()
        written = file.with_name(f".{me.pid}")
        written.write_text(json.dumps(record))
        written.replace(file)
        if not any(one.pid == me.pid for one in _claims):
            file.unlink()
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): other engines on this machine do not see the %.1f MiB "
            "that this one will take",
            file,
            error.strerror,
            rest / 2**20,
        )


def _of_other(file: Path) -> int:
    """Return what is left of another process's claims; those of one that ended are deleted."""
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
