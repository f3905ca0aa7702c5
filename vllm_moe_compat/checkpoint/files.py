"""Read files of an untrusted checkpoint in bounded time and memory.

A downloaded folder may hold a pipe, on which a read waits for ever, an endless device, a link
to itself, or a gigabyte of JSON. Only regular files are opened, sizes are limited, and an
unreadable file becomes a ``FileFault`` or an ``UnreadableError``, never an ``OSError``.
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
"""Limit for the nesting of JSON; real checkpoints stay below 10."""


@dataclass(frozen=True, slots=True)
class FileFault:
    """A fault of one file.

    Attributes:
        id: the kind of fault, for programs.
        message: the file, the finding and the expectation.
        remedy: the way to repair it.
    """

    id: str
    message: str
    remedy: str = AGAIN

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}."


Report: TypeAlias = Callable[[FileFault], None]
"""Receives a fault: raises it, or records it so that the caller continues."""


def refuse(fault: FileFault) -> None:
    """Raise the fault.

    Raises:
        CheckpointFileError: always.
    """
    raise CheckpointFileError(str(fault))


class UnreadableError(Exception):
    """A file cannot be read; the message continues a sentence that names the file."""


def opened(path: Path) -> int:
    """Open a regular file for reading without blocking; return its descriptor.

    Raises:
        UnreadableError: the path is not a regular file, or access is denied.
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
        f"it is {names.get(stat.S_IFMT(kind), 'something else')}, not a regular file"
    )


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        UnreadableError: the file cannot be read, or has more than ``limit`` bytes.
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
    """Return the value of a JSON file, and the keys that occur twice in one object.

    Raises:
        UnreadableError: the file is not UTF-8 or not JSON, or exceeds a limit of size or depth.
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
    """Return the value of a JSON text, and the keys that occur twice in one object."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice.extend(key for key, times in Counter(k for k, _ in pairs).items() if times > 1)
        return found

    return json.loads(text, object_pairs_hook=unique), list(dict.fromkeys(twice))


def too_deep(value: Any) -> bool:
    """Whether the nesting exceeds ``MAX_DEPTH``, beyond which copying would fail."""
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
