"""Check every link from Python to a served answer, and name the first broken one.

The checks run on a small checkpoint that is built for them and whose right answer is known,
or on MODEL, which must load, generate, and generate the same text again. Every check that
imports MLX or vLLM runs in a process of its own.
"""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", type=Path, help="a checkpoint's folder"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="limit for building, for loading and for serving (default: 600)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the checks and print the result; return 1 if a link is broken."""
    from vllm_moe_compat.commands.doctor.chain import examine
    from vllm_moe_compat.errors import CheckpointFileError

    if args.model is not None and not (args.model / "config.json").is_file():
        raise CheckpointFileError(
            f"{args.model}: no config.json was found, where a checkpoint's folder was expected; "
            "name one, or none for the demo checkpoint."
        )
    if threading.current_thread() is threading.main_thread():
        # An exception, so that the child process of a check is ended, too.
        signal.signal(signal.SIGTERM, _on_sigterm)
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

    def show(link: Link) -> None:
        line = Text(f"{link.state:8}", style=colours[link.state])
        line.append(f"{link.title}: ", style="bold")
        line.append(link.detail, style="default")
        console.print(line)
        if link.remedy:
            console.print(Text(f"{'':8}{link.remedy}"))

    found = examine(args.model, timeout=args.timeout, report=show)
    console.print()
    console.print(Text(found.answer))
    return 0 if found.first_broken is None else 1


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _seconds(words: str) -> float:
    try:
        seconds = float(words)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 10**6:
        raise argparse.ArgumentTypeError(f"{words!r} is no time; write seconds, such as 600")
    return seconds
