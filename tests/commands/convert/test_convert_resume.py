"""An interrupted conversion goes on behind its last finished shard, to the same bytes."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.cells import one_in
from support.checkpoints import Fp8, Sizes, build
from support.interrupting import contents, interrupted
from vllm_moe_compat.commands.convert.partial import Partial, partial_of
from vllm_moe_compat.commands.main import main

FORMS = {
    "floats": (),
    "packed": ("--quantize", "8bit"),
    "moved": ("--layout", "combined", "--fp8", "128x128"),
    "published": ("--layout", "per-expert", "--fp8", "none"),
}
SIZE = ("--max-shard-size", "200KB")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build(fp8=Fp8(), sizes=Sizes(128, 64)).write(tmp_path_factory.mktemp("source"))
    (path / "tokenizer.json").write_text("{}")
    return path


def convert(source: Path, target: Path, *words: str) -> int:
    return main(["convert", str(source), str(target), *SIZE, *words])


@pytest.mark.parametrize("form", one_in(2, FORMS))
def test_the_result_is_that_of_an_uninterrupted_run(
    form: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, target = FORMS[form], tmp_path / "out"
    assert convert(source, tmp_path / "whole", *words) == 0
    wanted = contents(tmp_path / "whole")
    work = partial_of(target) / "unfinished"
    capsys.readouterr()
    kept: dict[str, int] = {}
    # Shard by shard: each run goes on behind the last, and writes nothing a second time.
    for after in (1, 1, 2):
        with interrupted(after):
            assert convert(source, target, *words) == 130
        assert "finished shard" in capsys.readouterr().err
        assert not target.exists()
        found = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
        assert len(found) == len(kept) + after
        assert {name: found[name] for name in kept} == kept
        kept = found
    assert convert(source, target, *words) == 0
    assert contents(target) == wanted
    assert {name: (target / name).stat().st_mtime_ns for name in kept} == kept
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_before_the_first_shard_nothing_is_kept(source: Path, tmp_path: Path) -> None:
    with interrupted(0):
        assert convert(source, tmp_path / "out") == 130
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose conversion takes long enough to be interrupted on a busy machine."""
    sizes = Sizes(512, 512, experts=8, layers=8)
    return build("combined", sizes=sizes).write(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def whole(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("whole") / "out"
    assert main(["convert", str(large), str(target), "--max-shard-size", "10MB"]) == 0
    return contents(target)


@pytest.mark.parametrize(
    ("number", "after"),
    [
        (signal.SIGKILL, 5),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, 3, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.full),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.full),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, 9, marks=pytest.mark.full),
    ],
)
def test_a_process_that_is_ended_leaves_no_target_and_the_next_one_goes_on(
    number: signal.Signals,
    after: int,
    large: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out"
    words = [str(large), str(target), "--max-shard-size", "10MB"]
    command = [sys.executable, "-m", "vllm_moe_compat", "convert", *words]
    # A shell that starts this suite in the background has it, and its children, ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    limit = time.monotonic() + 120
    while (shards := finished(target)) is None or len(shards) < after:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    assert main(["convert", *words]) == 2
    assert "another conversion" in capsys.readouterr().err
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in said
    assert not target.exists()
    if after:
        # Whatever is left, no program takes it for a checkpoint.
        assert not (partial_of(target) / "unfinished" / "config.json").exists()
    kept = finished(target)
    if number != signal.SIGKILL:
        assert (kept is not None) == (b"goes on there" in said) == bool(after)
    assert main(["convert", *words]) == 0
    assert ("an interrupted run had finished" in capsys.readouterr().err) == bool(kept)
    assert contents(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def finished(target: Path) -> dict[str, object] | None:
    """Return the finished shards by the state of a conversion; None if there is none."""
    try:
        shards: dict[str, object] = json.loads((partial_of(target) / "state.json").read_text())[
            "shards"
        ]
    except FileNotFoundError:
        return None
    return shards


def identity(path: Path) -> tuple[int, int]:
    """Of a file's contents; a file system may give the number of a removed file to the next one."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_it_starts_over_and_says_why_when_anything_has_changed(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine, target = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(source, mine)
    state, work = partial_of(target) / "state.json", partial_of(target) / "unfinished"

    def renewed(part: str, *words: str) -> None:
        """Interrupt a run that has to start over."""
        before = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
        caplog.clear()
        with interrupted(2):
            assert convert(mine, target, *words) == 130
        (line,) = _warnings(caplog)
        assert "is started over" in line
        assert part in line
        assert not before.items() & {p.name: p.stat().st_mtime_ns for p in work.iterdir()}.items()

    with interrupted(2):
        assert convert(mine, target) == 130
    assert not _warnings(caplog)
    shard = sorted(mine.glob("*.safetensors"))[1]
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    renewed(f"{shard.name} of the source has changed")
    (mine / "config.json").write_text((mine / "config.json").read_text() + "\n")
    renewed("config.json of the source has changed")
    renewed("--quantize was none, and is 8bit", "--quantize", "8bit")
    renewed("--dtype was , and is float16", "--quantize", "8bit", "--dtype", "float16")
    text = json.loads(state.read_text())
    state.write_text(json.dumps(text | {"versions": text["versions"] | {"mlx": "0.1"}}))
    renewed("mlx was 0.1, and is", "--quantize", "8bit", "--dtype", "float16")
    state.write_text("{")
    renewed("its state cannot be read", "--quantize", "8bit", "--dtype", "float16")
    # A refusal leaves it alone.
    assert convert(mine, target, "--layout", "combined", "--quantize", "8bit") == 2
    assert len(finished(target) or ()) == 2
    capsys.readouterr()
    words = ("--quantize", "8bit", "--dtype", "float16")
    assert convert(mine, target, *words, "--replace-partial") == 0
    assert "an interrupted run had finished" not in capsys.readouterr().err


def test_a_finished_shard_that_is_no_longer_whole_is_written_anew(
    source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    assert convert(source, tmp_path / "whole") == 0
    with interrupted(3):
        assert convert(source, target) == 130
    first, second, third = sorted((partial_of(target) / "unfinished").iterdir())
    first.unlink()
    os.truncate(second, second.stat().st_size - 1)
    with third.open("r+b") as file:
        file.seek(20)
        file.write(b"\x00")
    assert convert(source, target) == 0
    assert contents(target) == contents(tmp_path / "whole")


def test_files_of_others_are_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = partial_of(tmp_path / "out")
    folder.mkdir()
    (folder / "mine").write_text("mine")
    assert convert(source, tmp_path / "out") == 2
    assert "--replace-partial" in capsys.readouterr().err
    assert (folder / "mine").read_text() == "mine"
    assert convert(source, tmp_path / "out", "--replace-partial") == 0
    assert not folder.exists()


def test_a_damaged_byte_keeps_the_target_away_and_costs_its_shard(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    assert convert(source, tmp_path / "whole") == 0
    for words in ((), ("--no-verify",)):
        with interrupted(2):
            assert convert(source, target) == 130
        shard = sorted((partial_of(target) / "unfinished").iterdir())[0]
        with shard.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
        if not words:
            capsys.readouterr()
            assert convert(source, target) == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert f"{shard.name}: " in line
            assert "was read back with other bytes" in line
            assert not list(target.iterdir())
            assert shard.name not in (finished(target) or ())
            assert convert(source, target) == 0
            assert contents(target) == contents(tmp_path / "whole")
            for path in target.iterdir():
                path.unlink()
        else:
            assert convert(source, target, *words) == 0
            assert contents(target) != contents(tmp_path / "whole")


def test_a_source_that_changes_meanwhile_is_not_published(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(source, mine)
    real = Partial.finished

    def touching(*args: object) -> None:
        os.utime(mine / "config.json", ns=(0, 0))
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Partial, "finished", touching)
    assert convert(mine, tmp_path / "out") == 2
    assert "config.json has changed while" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_disk_that_fills_up_keeps_the_finished_shards(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """The limit of the size of files stands for the disk's: the same call fails."""
    target = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = Partial.finished

    def limited(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "finished", limited)
        try:
            assert convert(source, target) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "File too large" in line
    assert "1 finished shard kept in" in line
    assert "the same command goes on there" in line
    (kept,) = finished(target) or ()
    assert [path.name for path in (partial_of(target) / "unfinished").iterdir()] == [kept]
    assert convert(source, target) == 0
    assert convert(source, tmp_path / "whole") == 0
    assert contents(target) == contents(tmp_path / "whole")
