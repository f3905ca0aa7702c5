"""Run a command beside a disk that is full or read-only, really: a tmpfs of its own.

Needs Linux with user namespaces.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence

MOUNT = "/mnt"
"""Where the command sees the disk; nobody else does, and it goes with the command."""


def beside_disk(options: str) -> list[str]:
    """The beginning of a command that runs the rest of it beside such a disk."""
    script = f'mount -t tmpfs -o {options} none {MOUNT} && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]


def run_with_disk(
    options: str, command: Sequence[str], env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run the command beside such a disk, and print what it leaves there."""
    script = f"{shlex.join(command)}; code=$?; echo left: $(ls -A {MOUNT}); exit $code"
    return subprocess.run(
        [*beside_disk(options), "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(env),
    )
