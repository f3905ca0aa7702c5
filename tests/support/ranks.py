"""Several processes on this machine that are the ranks of one group, over MLX's ring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.server import free_port

TESTS = Path(__file__).parent.parent
SECONDS = 280


def run(module: str, folder: Path, count: int, *args: str, seconds: float = SECONDS) -> list[Any]:
    """Run ``python -m module folder args…`` once for each rank; return what each one wrote.

    A rank writes JSON to ``{rank}.json`` in the folder.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(count)]))
    started = []
    try:
        for rank in range(count):
            environment = os.environ | {
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(hosts),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            }
            log = (folder / f"{rank}.log").open("wb")
            with log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, str(folder), *args],
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=TESTS.parent,
                    )
                )
        codes = [process.wait(seconds) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"{rank}.log").read_text() for rank in range(count))
    assert codes == [0] * count, logs
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
