"""Files of a checkpoint, which may be anything: what is no regular file is not opened.

A folder from elsewhere may hold a pipe, on which a read would wait for ever, a device
without end, a link to itself, or a gigabyte of JSON. Everything here answers in bounded
time and memory, and what it cannot read is a ``FileFault``, not an exception of the
operating system's.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vllm_moe_compat.errors import CheckpointFileError

AGAIN = "download the checkpoint again"
MAX_DEPTH = 100
"""How deep JSON may be nested; that of real checkpoints is below 10."""


@dataclass(frozen=True, slots=True)
class FileFault:
    """What is wrong with one file.

    Attributes:
        id: the kind of fault, for programs.
        message: which file, and what was found in place of what.
        remedy: what to do about it.
    """

    id: str
    message: str
    remedy: str = AGAIN

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}."


Report: TypeAlias = Callable[[FileFault], None]
"""What takes a fault: raises it, or puts it on a list and lets the caller go on."""


def refuse(fault: FileFault) -> None:
    """Raise the fault.

    Raises:
        CheckpointFileError: always.
    """
    raise CheckpointFileError(str(fault))


class UnreadableError(Exception):
    """Why a file cannot be read, in words that follow its name."""


def opened(path: Path) -> int:
    """Open a regular file for reading and return its descriptor; never waits.

    Raises:
        UnreadableError: it is something else, or may not be read.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for someone to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UnreadableError(str(error)) from error
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    names = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    raise UnreadableError(
        f"it is {names.get(stat.S_IFMT(kind), 'something else')}, no regular file"
    )


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        UnreadableError: it cannot be read, or has more than ``limit`` bytes.
    """
    descriptor = opened(path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UnreadableError(str(error)) from error
    if len(content) > limit:
        raise UnreadableError(f"it has more than {limit:,} bytes")
    return content


def read_json(path: Path, limit: int) -> tuple[Any, list[str]]:
    """Return what a JSON file holds, and the keys that one of its objects has twice.

    Raises:
        UnreadableError: no UTF-8, no JSON, or JSON of a size or depth that nothing real has.
    """
    content = read_bytes(path, limit)
    try:
        value, twice = parse_json(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnreadableError(str(error)) from error
    if too_deep(value):
        raise UnreadableError(f"it is nested more than {MAX_DEPTH} levels deep")
    return value, twice


def parse_json(text: str) -> tuple[Any, list[str]]:
    """Return the value of a JSON text, and the keys that one of its objects has twice."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice.extend(key for key, times in Counter(k for k, _ in pairs).items() if times > 1)
        return found

    return json.loads(text, object_pairs_hook=unique), list(dict.fromkeys(twice))


def too_deep(value: Any) -> bool:
    """Whether the value is nested deeper than what copies and compares it can follow."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
