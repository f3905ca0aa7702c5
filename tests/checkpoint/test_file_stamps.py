"""Files that changed since they were read are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_moe_compat.checkpoint import file_stamps
from vllm_moe_compat.errors import CheckpointFileError

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", SHARD, "model-00002-of-00002.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_untouched_files_and_files_that_no_load_reads(folder: Path) -> None:
    stamps = file_stamps.take(folder)
    (folder / "README.md").write_text("other")
    (folder / "adapter.safetensors").write_text("new")
    (folder / SHARD).read_bytes()
    file_stamps.check(stamps, "x")


def later(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (lambda path: path.write_text("longer than before, by far"), SHARD, "there is 26 bytes"),
        (later, SHARD, "there was 32 bytes of "),
        (later, "config.json", "there was 11 bytes of "),
        (Path.unlink, SHARD, "now there is none; do this."),
        (lambda path: path.touch(), "model.safetensors", "there was no such file, and now"),
    ],
)
def test_a_changed_file_is_named(
    folder: Path, change: Callable[[Path], object], name: str, words: str
) -> None:
    stamps = file_stamps.take(folder)
    change(folder / name)
    with pytest.raises(CheckpointFileError) as error:
        file_stamps.check(stamps, "do this")
    assert str(error.value).startswith(f"{folder / name}: when it was loaded there was ")
    assert words in str(error.value)


def test_a_link_into_a_hubs_cache_is_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(folder / SHARD)
    stamps = file_stamps.take(snapshot)
    later(folder / SHARD)
    with pytest.raises(CheckpointFileError):
        file_stamps.check(stamps, "x")
