"""mlx-lm cannot be imported with fewer open files than it asks for; the refusal says so."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from vllm import EngineArgs
EngineArgs(model=sys.argv[1]).create_engine_config()
"""


@pytest.mark.full
@pytest.mark.serve
def test_a_hard_limit_that_is_too_low_is_named(demo_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(demo_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        preexec_fn=limit,
    )
    assert ran.returncode == 1
    assert "a hard limit below 4096 open files" in ran.stderr
    assert "ulimit -n 4096" in ran.stderr
