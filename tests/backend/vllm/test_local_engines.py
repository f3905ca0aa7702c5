"""Engines of one machine agree on its memory, in a real file, from several threads or processes."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_moe_compat.backend.vllm.local_engines import Meeting
from vllm_moe_compat.errors import UnsupportedServingError


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_all_get_the_numbers_of_all() -> None:
    def engine(index: int) -> tuple[list[int], list[int]]:
        with Meeting("one", 3, index).attended() as meeting:
            return meeting.exchange("loaded", 0), meeting.exchange("free", 100 + index)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(engine, range(3)))
    assert found == [([0, 0, 0], [100, 101, 102])] * 3
    assert list(Meeting("one", 3, 0).file.parent.iterdir()) == []


def test_an_engine_that_fails_ends_the_wait_of_the_others() -> None:
    with Meeting("two", 2, 1).attended() as meeting:
        meeting.exchange  # noqa: B018 - it leaves without a word
    with (
        pytest.raises(UnsupportedServingError, match=r"Engine 1 of 2 .* has ended while"),
        Meeting("two", 2, 0).attended() as meeting,
    ):
        meeting.exchange("loaded", 0)


KILLED = """
import os, sys, tempfile
from vllm_moe_compat.backend.vllm.local_engines import Meeting
tempfile.tempdir = sys.argv[1]
with Meeting("three", 2, 1).attended() as meeting:
    meeting._say("loaded", 0)
    os._exit(9)
"""


def test_an_engine_that_is_killed_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == 9
    with Meeting("three", 2, 0).attended() as meeting:
        assert meeting.exchange("loaded", 0) == [0, 0]
        with pytest.raises(UnsupportedServingError, match=r"Engine 1 of 2 .* has ended while"):
            meeting.exchange("free", 1)


def test_a_meeting_of_killed_engines_is_forgotten(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    folder = Meeting("three", 2, 0).file.parent
    assert [file.name for file in folder.iterdir()] == ["three"]
    with Meeting("four", 1, 0).attended() as meeting:
        assert [file.name for file in folder.iterdir()] == []
        assert meeting.exchange("loaded", 5) == [5]
