"""Say what a checkpoint is and what will be done to it; no tensor is read.

Reads ``config.json``, the index and the safetensors headers, makes the plan of a load and
prints it. Imports neither MLX nor torch. What a checkpoint says is not trusted: whatever
is wrong with it is a finding. Exit codes: 0 fine, 1 an error was found, so it would not be
served; 2 its files cannot be read, or there is no such checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FORMATS = ("text", "json", "markdown")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command takes."""
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
        help="text (the default), json (docs/inspect.md has its form), or markdown for an issue",
    )


def run(args: argparse.Namespace) -> int:
    """Inspect, write the report to stdout, and return the exit code.

    Raises:
        SettingError: there is no such checkpoint, or a variable of ours means nothing.
    """
    from vllm_moe_compat.commands.inspect.collect import inspect

    with _uncollected():
        found = inspect(args.checkpoint)
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
def _uncollected() -> Iterator[None]:
    """Keep Python from looking for garbage among hundreds of thousands of live objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _writable(text: str) -> str:
    """Return the text with question marks for what stdout's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
