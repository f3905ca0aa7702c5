"""Ranks as processes of their own, without vLLM: they meet in a folder."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def started(folder: Path, size: int, task: str, **options: Any) -> Iterator[list[Any]]:
    """Processes that run ``task`` of this module, one per rank; killed at the end."""
    tests = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "support.rank_processes"),
                *(str(folder), str(rank), str(size), task, json.dumps(options)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(size)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


class Meeting:
    """Exchanges objects between processes by files."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder, self.rank, self.size, self.count = folder, rank, size, 0

    def __call__(self, own: Any) -> list[Any]:
        self.count += 1
        mine = self.folder / f"{self.count}-{self.rank}"
        mine.with_suffix(".part").write_text(json.dumps(own))
        mine.with_suffix(".part").rename(mine)
        found = []
        for rank in range(self.size):
            path = self.folder / f"{self.count}-{rank}"
            end = time.monotonic() + 60
            while not path.exists():
                if time.monotonic() > end:
                    raise TimeoutError(path)
                time.sleep(0.01)
            found.append(json.loads(path.read_text()))
        return found


def main() -> None:
    from vllm_moe_compat.ranks.connect import Place, connect
    from vllm_moe_compat.ranks.heartbeat import Heartbeat
    from vllm_moe_compat.ranks.same_tokens import tell

    folder, rank, size, task, options = sys.argv[1:]
    logging.basicConfig(format="%(message)s", level="INFO")
    place = Place(int(rank), int(size), int(rank), int(size), "127.0.0.1")
    exchange = Meeting(Path(folder), place.rank, place.size)
    settings = json.loads(options)
    heartbeat = Heartbeat(place, exchange, **settings.get("heartbeat", {}))
    group = connect(place, exchange)
    if task == "tell":
        own = settings["own"][place.rank]
        try:
            told = tell(group, settings["source"], own, settings.get("most", 1))
            print(json.dumps(told), flush=True)
        except RuntimeError as error:
            print(json.dumps(str(error)), flush=True)
        # The others may still need what this rank has to pass on.
        exchange("done")
        heartbeat.close()
    if task == "work":
        import mlx.core as mx

        for step in range(10**9):
            if step == 1:
                print("works", flush=True)
            if step == 5 and place.rank == settings.get("hangs"):
                time.sleep(3600)
            heartbeat.progress()
            total = mx.ones(8)
            for _ in range(100):
                total = mx.distributed.all_sum(total, group=group) / place.size
            mx.eval(total)
            time.sleep(0.05)


if __name__ == "__main__":
    main()
