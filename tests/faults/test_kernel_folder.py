"""The folder of MLX's compiled kernels: read-only, full, or with half a kernel in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.small_disk import MOUNT, run_with_disk

SCRIPT = """
import logging, mlx.core as mx
from vllm_moe_compat.backend.model import kernels
logging.basicConfig(format="%(message)s")
kernels.settle()
fused = mx.compile(lambda x: mx.exp(x * 2.0 + 1.0) * x)
assert fused(mx.zeros((3, 5))).sum().item() == 0
"""
COMMAND = [sys.executable, "-c", SCRIPT]


def run(temporary: Path | str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TMPDIR": str(temporary)}
    return subprocess.run(
        COMMAND, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def test_a_folder_that_nobody_can_write_to_is_done_without() -> None:
    ran = run("/proc")
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert "/proc/mlx/" in line
    assert "set TMPDIR to a folder that can be written to" in line


def test_half_a_kernel_is_compiled_again(tmp_path: Path) -> None:
    assert run(tmp_path).stderr == ""
    (kernel,) = tmp_path.glob("mlx/*/cpu/lib*.so")
    whole = kernel.read_bytes()
    kernel.write_bytes(whole[:3000])
    # Younger files may be the ones that another process is writing.
    os.utime(kernel, (time.time() - 3600,) * 2)
    ran = run(tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "removed 1 damaged kernel, which MLX will compile again" in ran.stderr
    assert len(kernel.read_bytes()) == len(whole)
    assert run(tmp_path).stderr == "", "a whole kernel is left alone"


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "Read-only file system"), ("size=64k", "No space left on device")],
)
def test_a_read_only_or_full_disk_is_done_without(options: str, reason: str) -> None:
    ran = run_with_disk(options, COMMAND, os.environ | {"TMPDIR": MOUNT})
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert reason in line
