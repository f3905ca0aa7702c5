"""The command line ``vllm-moe-compat COMMAND …``.

Each command is a package with a module ``command`` that has ``add_arguments(parser)`` and
``run(args) -> int``. Exit codes: 0 no problem, 1 problems found, 2 wrong usage or an
unreadable checkpoint. Every error of this package is printed as one line on stderr; a
traceback is a bug.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from vllm_moe_compat import __version__
from vllm_moe_compat.errors import CheckpointFileError, CompatError, SettingError

FINE, PROBLEMS, UNUSABLE = 0, 1, 2

COMMANDS = {
    "inspect": "say what a checkpoint is and what will be done to it; reads headers only",
    "status": "say what is installed, which workarounds are active, and what ends them",
    "doctor": "run the whole chain and name the first broken link",
    "convert": "write a checkpoint in another layout, for use without this plugin",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="vllm-moe-compat",
        description="Mixture-of-Experts checkpoints on MLX, as their authors publish them.",
        epilog="Exit codes: 0 fine, 1 problems found, 2 usage, or what cannot be read.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, words in COMMANDS.items():
        module = importlib.import_module(f"vllm_moe_compat.commands.{name}.command")
        described = (module.__doc__ or "").split("\n\n", 1)[0].replace("``", "")
        command = commands.add_parser(
            name,
            help=words,
            description=described,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    args.own_process = argv is None
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (CheckpointFileError, SettingError) as error:
        print(f"vllm-moe-compat: {error}", file=sys.stderr)
        return UNUSABLE
    except CompatError as error:
        print(f"vllm-moe-compat: {error}", file=sys.stderr)
        return PROBLEMS
    except BrokenPipeError:
        # The reader has gone (`| head`); keep the interpreter from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except OSError as error:  # A read-only folder, a full disk, no descriptors left.
        print(f"vllm-moe-compat: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return 130
