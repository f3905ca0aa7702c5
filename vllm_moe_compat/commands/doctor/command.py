"""Run the whole chain in this environment, and name the first link that is broken.

From Python and the installed packages to an answer of vLLM's engine: on a small checkpoint
that is built on the spot, whose right answer is known, or on MODEL, which has to load, to
generate and to repeat itself. Whatever imports MLX or vLLM runs in a process of its own.
"""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", type=Path, help="a checkpoint's folder"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="that building, loading and serving may take each (default: 600)",
    )


def run(args: argparse.Namespace) -> int:
    """Look, say what was seen; 1 where something is broken."""
    from vllm_moe_compat.commands.doctor.chain import examine
    from vllm_moe_compat.errors import CheckpointFileError

    if args.model is not None and not (args.model / "config.json").is_file():
        raise CheckpointFileError(
            f"{args.model}: no config.json was found, where a checkpoint's folder was expected; "
            "name one, or none for the demo checkpoint."
        )
    if threading.current_thread() is threading.main_thread():
        # So that what runs in a process of its own ends, too.
        signal.signal(signal.SIGTERM, _ended)
    if args.format == "json":
        import json

        found = examine(args.model, timeout=args.timeout)
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return 0 if found.first_broken is None else 1

    from rich.console import Console
    from rich.text import Text

    from vllm_moe_compat.commands.doctor.link import Link

    console = Console(soft_wrap=True, highlight=False)
    colours = {"ok": "green", "warning": "yellow", "broken": "bold red", "skipped": "dim"}

    def tell(link: Link) -> None:
        line = Text(f"{link.state:8}", style=colours[link.state])
        line.append(f"{link.title}: ", style="bold")
        line.append(link.detail, style="default")
        console.print(line)
        if link.remedy:
            console.print(Text(f"{'':8}{link.remedy}"))

    found = examine(args.model, timeout=args.timeout, tell=tell)
    console.print()
    console.print(Text(found.answer))
    return 0 if found.first_broken is None else 1


def _ended(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _seconds(words: str) -> float:
    try:
        seconds = float(words)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 10**6:
        raise argparse.ArgumentTypeError(f"{words!r} is no time; write seconds, such as 600")
    return seconds
