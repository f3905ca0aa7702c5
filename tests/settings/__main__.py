"""Run the sweep, and go on where it was stopped or has crashed.

python -m settings --out FOLDER [--again OUTCOME ...] [--families FAMILY ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def forget(out: Path, outcomes: list[str]) -> None:
    """Forget the trials with these outcomes, so that they are run again."""
    for log in out.glob("*.jsonl"):
        log.with_suffix(".done").unlink(missing_ok=True)
        kept = [
            line
            for line in log.read_text().splitlines(keepends=True)
            if json.loads(line)["outcome"] not in outcomes
        ]
        log.write_text("".join(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--again", nargs="+", metavar="OUTCOME", help="run those again")
    parser.add_argument("--families", nargs="+", default=[], metavar="FAMILY")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.again:
        forget(options.out, options.again)
    command = [sys.executable, "-m", "settings.sweep", "--out", str(options.out)]
    code = -1
    for _ in range(20):  # A crash is recorded, and the next process goes on.
        code = subprocess.run([*command, *options.families], check=False).returncode
        if code >= 0:
            break
    sys.exit(code)


if __name__ == "__main__":
    main()
