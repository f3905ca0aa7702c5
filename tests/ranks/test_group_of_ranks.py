"""Ranks as processes: they find each other, have the same tokens, and notice a lost one."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from support import rank_processes


def _printed(rank: Any) -> Any:
    return json.loads(rank.stdout.readline())


def test_the_tokens_of_one_rank_count(tmp_path: Path) -> None:
    """Also where a rank drew more tokens for a request than another."""
    told = [[6, 4], [], [7], [0, 0, 0]]
    own = [[[5, 4, 3], [], [7], [0]], told, [[6], [], [8, 9], [0, 0]]]
    with rank_processes.started(tmp_path, 3, "tell", own=own, source=1, most=3) as ranks:
        assert [_printed(rank) for rank in ranks] == [told] * 3
        assert [rank.wait(30) for rank in ranks] == [0, 0, 0]


def test_a_request_that_fails_on_one_rank_only_is_named(tmp_path: Path) -> None:
    own = [[[5], [4]], [[5], []]]
    with rank_processes.started(tmp_path, 2, "tell", own=own, source=0) as ranks:
        first, second = (_printed(rank) for rank in ranks)
    assert first == [[5], [4]]
    assert second.startswith("a request failed on rank 1 and not on rank 0")


@pytest.mark.parametrize(
    ("lose", "options", "words"),
    [
        (signal.SIGKILL, {}, "has ended"),
        pytest.param(
            *(signal.SIGSTOP, {"heartbeat": {"silence": 3}}, "has said nothing for 3 seconds"),
            marks=pytest.mark.full,
        ),
        pytest.param(
            *(None, {"heartbeat": {"stall": 3}, "hangs": 1}, "has hung for 3 seconds"),
            marks=pytest.mark.full,
        ),
    ],
    ids=["killed", "stopped", "hangs"],
)
def test_the_others_end_and_name_a_rank_that_is_lost(
    tmp_path: Path, lose: signal.Signals | None, options: dict[str, Any], words: str
) -> None:
    """MLX itself waits for it, for ever."""
    with rank_processes.started(tmp_path, 3, "work", **options) as ranks:
        for rank in ranks:
            assert rank.stdout.readline() == "works\n"
        time.sleep(0.3)  # In the middle of an evaluation, most likely.
        if lose is not None:
            ranks[1].send_signal(lose)
        others = [ranks[0], ranks[2]]
        assert [rank.wait(60) for rank in others] == [1, 1]
        said, also = (rank.communicate()[1] for rank in others)
        name = f"rank 1 (process {ranks[1].pid} on 127.0.0.1)"
        assert f"{name} {words}" in said
        assert f"rank 2 ends, since {name} {words}" in also


def test_ranks_that_choose_different_transports_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_COLLECTIVES", "mpi")
    with rank_processes.started(tmp_path, 1, "tell", own=[[[1]]], source=0) as (rank,):
        said = rank.communicate(timeout=60)[1]
    assert "VLLM_MOE_COMPAT_COLLECTIVES=mpi: this MLX does not have it; it has ring." in said
