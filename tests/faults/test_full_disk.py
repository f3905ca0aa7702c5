"""``convert`` on a disk that takes no more: one sentence, and nothing is left."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import Fp8, Sizes, build
from support.small_disk import MOUNT, run_with_disk

CONVERT = [sys.executable, "-m", "vllm_moe_compat", "convert"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(fp8=Fp8(), sizes=Sizes(64, 32)).write(tmp_path_factory.mktemp("source"))


@pytest.mark.full
def test_a_file_may_grow_no_more(source: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    ran = subprocess.run(
        [*CONVERT, str(source), str(tmp_path / "target")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=limit,
    )
    assert ran.returncode == 2, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert "File too large" in line
    assert "free space or name another folder" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=1m", "will be written, where only"),
        ("size=1g,nr_inodes=4", "No space left on device"),
        ("ro", "Read-only file system"),
    ],
)
def test_a_disk_without_space_or_files_left(options: str, words: str, source: Path) -> None:
    ran = run_with_disk(options, [*CONVERT, str(source), f"{MOUNT}/target"], os.environ)
    assert ran.returncode == 2, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert words in line
    assert ran.stdout.splitlines() == ["left:"]
