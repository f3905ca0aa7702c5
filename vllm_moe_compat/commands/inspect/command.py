"""Describe a checkpoint and the plan of its load; no tensor is read.

Reads ``config.json``, the index and the safetensors headers, makes the plan of a load and
prints it. Imports neither MLX nor torch. The checkpoint is not trusted: every fault in it
is a finding. Exit codes: 0 no error, 1 an error was found, so the checkpoint would not be
served, 2 the files cannot be read, or there is no such checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FORMATS = ("text", "json", "markdown")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoint",
        metavar="PATH_OR_DIR",
        help="a folder, one .safetensors file, or a repository id that is in the hub's cache "
        "(ORG/NAME, or ORG/NAME@REVISION)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="text (the default), json (described in docs/inspect.md), or markdown for an issue",
    )
    parser.add_argument(
        "--ranks",
        type=_ranks,
        default=1,
        metavar="N",
        help="also say what each of N ranks would hold (--tensor-parallel-size N, "
        "--pipeline-parallel-size N)",
    )


def _ranks(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if not 1 <= count <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 1024")
    return count


def run(args: argparse.Namespace) -> int:
    """Inspect, write the report to stdout, and return the exit code.

    Raises:
        SettingError: there is no such checkpoint, or an environment variable is not valid.
    """
    from vllm_moe_compat.commands.inspect.collect import inspect
    from vllm_moe_compat.plan.config_class import leave_torch_out

    if getattr(args, "own_process", False):
        leave_torch_out()
    with _without_gc():
        found = inspect(args.checkpoint, getattr(args, "ranks", 1))
    if args.format == "json":
        from vllm_moe_compat.commands.inspect import as_json

        sys.stdout.write(as_json.render(found))
    elif args.format == "markdown":
        from vllm_moe_compat.commands.inspect import markdown

        sys.stdout.write(_writable(markdown.render(found)))
    elif sys.stdout.isatty():
        from vllm_moe_compat.commands.inspect import text

        text.show(found, sys.stdout)
    else:
        from vllm_moe_compat.commands.inspect import text

        sys.stdout.write(_writable(text.render(found)))
    return found.exit_code


@contextmanager
def _without_gc() -> Iterator[None]:
    """Switch garbage collection off: it would scan hundreds of thousands of live objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _writable(text: str) -> str:
    """Return the text with ``?`` for characters that stdout's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
