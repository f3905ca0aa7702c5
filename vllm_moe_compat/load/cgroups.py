"""The memory limit of a Linux container, in both versions of control groups.

A process belongs to a group, whose ancestors may have limits, too; the least one counts. Memory
that holds clean pages of files is counted as used by the kernel and is free for the taking, so it
counts as free here, as it does in the host's own figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def limits(root: Path = ROOT, own: Path = OWN) -> tuple[int, int] | None:
    """Return the bytes that this process's groups allow, and those of them that are free.

    Args:
        root: where the control groups are mounted.
        own: the file with this process's groups, ``number:controllers:path`` in each line.

    Returns:
        None if no group has a limit.
    """
    found = [limit for folder, names in _groups(root, own) if (limit := _limit(folder, *names))]
    if not found:
        return None
    return min(total for total, _ in found), min(free for _, free in found)


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield this process's groups up to the root, each with its version's names."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # No Linux, or a kernel without control groups.
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _V1) if controllers else (root, _V2)
        # A container may see its own group as the root, whatever its path is outside.
        group = top / path.lstrip("/")
        while group != top:
            yield group, names
            group = group.parent
        yield top, names


def _limit(folder: Path, limit: str, usage: str, inactive: str) -> tuple[int, int] | None:
    """Return limit and free bytes of one group; None without a limit (``max``, or no file)."""
    try:
        allowed = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    for line in lines:
        name, _, value = line.partition(" ")
        if name == inactive:
            used -= int(value)
    return allowed, max(0, allowed - used)
