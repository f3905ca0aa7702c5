"""The engines of one machine agree on what each may take of its memory.

Each engine of ``--data-parallel-size`` would otherwise measure the memory that is free and plan to
use it, at a moment when the others have not loaded yet, or have not taken their pages. So they
meet twice, when all have loaded and when all have measured, and go by the least that one of them
has seen, divided by their number. No clock decides anything.

They meet in a file, to which each appends what it has to say. vLLM's process groups cannot be used:
engines of a model without experts (``data_parallel.py``) have none in common.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from vllm_moe_compat.backend.vllm import data_parallel
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.load import claims
from vllm_moe_compat.load.memory import device_memory
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PATIENCE = 3600.0
"""Seconds to wait for the others; vLLM's front end gives up earlier, by a setting of its own."""
_PAUSE = 0.02
_LEFT = "left"


def device_memory_for_all(vllm_config: VllmConfig) -> tuple[int, int, int]:
    """Return total and free bytes of the device, and the number of engines that share them.

    Returns when all engines have measured; to be called when the model is loaded. All get the
    same numbers.

    Raises:
        UnsupportedServingError: another engine has ended, or does not come.
    """
    name, engines = data_parallel.local_engines(vllm_config)
    if engines == 1:
        return *device_memory(), 1
    index = vllm_config.parallel_config.data_parallel_rank_local or 0
    with Meeting(name, engines, index).attended() as meeting:
        meeting.exchange("loaded", 0)
        total, free = device_memory()
        return total, min(meeting.exchange("free", free)), engines


@dataclass(frozen=True)
class Meeting:
    """A meeting of ``count`` engines of this user on this machine; this one is ``index``."""

    name: str
    count: int
    index: int

    @property
    def file(self) -> Path:
        """Return the file in which they meet."""
        return claims.folder().with_name("engines") / self.name

    @contextmanager
    def attended(self) -> Iterator[Meeting]:
        """Take part; the last one to leave deletes the file."""
        for made in (self.file.parent.parent, self.file.parent):
            made.mkdir(mode=0o700, exist_ok=True)
            if made.lstat().st_uid != os.getuid():
                raise UnsupportedServingError(
                    f"{made} belongs to another user, and the engines of this machine agree on "
                    "their memory in it; set TMPDIR to a folder of yours."
                )
        _forget_ended_meetings(self.file)
        try:
            yield self
        finally:
            self._say(_LEFT, 0)

    def exchange(self, topic: str, value: int) -> list[int]:
        """Tell the others a number, wait for theirs, and return all in the engines' order.

        Raises:
            UnsupportedServingError: another engine has ended, or does not come.
        """
        self._say(topic, value)
        end = time.monotonic() + PATIENCE
        while True:
            said = _read(self.file)
            found = {one["index"]: one["value"] for one in said if one["topic"] == topic}
            if len(found) == self.count:
                return [found[index] for index in range(self.count)]
            absent = [index for index in range(self.count) if index not in found]
            for one in said:
                if one["index"] in absent and (one["topic"] == _LEFT or _has_ended(one)):
                    raise UnsupportedServingError(
                        f"Engine {one['index']} of {self.count} on this machine (process "
                        f"{one['pid']}) has ended while it started, so this one ends too; its own "
                        "error is above."
                    )
            if time.monotonic() > end:
                raise UnsupportedServingError(
                    f"Engine {absent[0]} of {self.count} on this machine has not loaded the model "
                    f"within {PATIENCE:.0f} s of engine {self.index}; see its log."
                )
            time.sleep(_PAUSE)

    def _say(self, topic: str, value: int) -> None:
        me = psutil.Process()
        line = {"index": self.index, "topic": topic, "value": value}
        line |= {"pid": me.pid, "started": me.create_time()}
        with self.file.open("a+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            stream.seek(0)
            said = [json.loads(text) for text in stream]
            if len({one["index"] for one in said if one["topic"] == _LEFT}) == self.count:
                self.file.unlink(missing_ok=True)


def _read(file: Path) -> list[dict[str, Any]]:
    with file.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        return [json.loads(text) for text in stream]


def _has_ended(one: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(one["pid"])
        return bool(
            process.create_time() != one["started"] or process.status() == psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return True


def _forget_ended_meetings(mine: Path) -> None:
    """Delete the files of meetings whose engines were all killed."""
    for file in mine.parent.iterdir():
        if file != mine:
            try:
                said = _read(file)
                if said and all(map(_has_ended, said)):
                    file.unlink(missing_ok=True)
            except OSError as error:
                logger.debug("%s cannot be read: %s", file, error)
