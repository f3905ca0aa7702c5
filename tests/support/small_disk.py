"""Run a command beside a disk that is full or read-only, really: a tmpfs of its own."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence

MOUNT = "/mnt"
"""Where the command sees the disk; nobody else does, and it goes with the command."""


def run_with_disk(
    options: str, command: Sequence[str], env: Mapping[str, str], before: str = "true"
) -> subprocess.CompletedProcess[str]:
    """Mount a tmpfs with these options, run ``before`` and the command, list what is left.

    Needs Linux with user namespaces.
    """
    script = (
        f"mount -t tmpfs -o {options} none {MOUNT} && {before} && "
        f"{{ {shlex.join(command)}; code=$?; echo left: $(ls -A {MOUNT}); exit $code; }}"
    )
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(env),
    )
