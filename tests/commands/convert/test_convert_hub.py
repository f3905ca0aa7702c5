"""SRC may be a repository in the hub's cache; nothing is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.checkpoints import Fp8, Sizes, build
from support.loading import read, same_bits
from vllm_moe_compat.commands.main import main


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``org/name`` at commit ``abc``, in the cache that is set."""
    source = build(fp8=Fp8(), sizes=Sizes(64, 32)).write(tmp_path / "source", shards=3)
    cached = tmp_path / "hub" / "models--org--name"
    folder, blobs = cached / "snapshots" / "abc", cached / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / str(number))
        (folder / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


@pytest.mark.parametrize("name", ["org/name", "org/name@main", "org/name@abc"])
def test_a_cached_repository_is_converted_like_its_folder(
    name: str, snapshot: Path, tmp_path: Path
) -> None:
    assert main(["convert", name, str(tmp_path / "by-id"), "--layout", "combined"]) == 0
    assert main(["convert", str(snapshot), str(tmp_path / "by-path"), "--layout", "combined"]) == 0
    assert same_bits(read(tmp_path / "by-id"), read(tmp_path / "by-path"))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("org/other", "`hf download org/other`"),
        ("org/name@v2", "`hf download org/name --revision v2`"),
        ("../name", "does not exist"),
    ],
)
def test_a_repository_that_is_not_there_is_named(
    name: str, part: str, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", name, str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


def test_a_download_that_has_not_ended_is_named(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = snapshot / "model-00002-of-00003.safetensors"

    def said() -> str:
        assert main(["convert", "org/name", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert {path.name for path in tmp_path.iterdir()} == {"source", "hub"}
        return line

    shard.resolve().rename(tmp_path / "hub" / "incomplete")
    assert shard.name in (line := said())
    assert "download the checkpoint again" in line
    shard.unlink()
    assert shard.name in (line := said())
    assert "download the checkpoint again" in line
    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    assert "download the model again" in said()
    (snapshot / "config.json").unlink()
    assert "no config.json" in said()
