"""Write a checkpoint in another layout, one tensor at a time.

By default DST becomes a checkpoint in MLX form, which mlx-lm loads without this plugin;
--quantize packs its weights. With --layout or --fp8 it becomes a checkpoint in a form that
authors publish. DST appears complete or not at all, and nothing is overwritten. After an
interruption the same command goes on behind the last finished shard.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from vllm_moe_compat.rewrite.written_layout import WrittenLayout

SETTINGS = ("none", "8bit", "mxfp8", "6bit", "4bit")
LAYOUTS = {
    "per-expert": "per-expert",
    "combined": "combined",
    "combined-transposed": "combined, transposed",
    "stacked": "stacked",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="the checkpoint's folder, or a repository in the hub's cache, as ORG/NAME or "
        "ORG/NAME@REVISION",
    )
    parser.add_argument("target", metavar="DST", type=Path, help="a folder that is new or empty")
    parser.add_argument(
        "--quantize", choices=SETTINGS, help="MLX form: pack the weights (default: none)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of floats (default: bfloat16 for dequantised FP8; other floats keep theirs)",
    )
    parser.add_argument("--layout", choices=LAYOUTS, help="published form: layout of the experts")
    parser.add_argument(
        "--fp8",
        metavar="BLOCK",
        help="published form: FP8 with one scale per block such as 128x128, per row or per "
        "tensor; none for floats",
    )
    parser.add_argument(
        "--scale-dtype", choices=("float32", "e8m0"), help="dtype of FP8 scales (default: float32)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=_bytes,
        default=5 * 10**9,
        metavar="SIZE",
        help="limit of a shard, such as 5GB or 500MiB (default: 5GB)",
    )
    parser.add_argument(
        "--replace-partial",
        action="store_true",
        help="remove what an interrupted conversion left, and start over",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read every tensor back from the disk and compare it before DST appears (default: "
        "--verify)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print the report."""
    layout = _layout(args)
    from vllm_moe_compat.commands.convert.conversion import Options, convert

    options = Options(
        layout=layout,
        setting=args.quantize or "none",
        dtype=args.dtype or "",
        shard_bytes=args.max_shard_size,
        replace_partial=args.replace_partial,
        verify=args.verify,
    )
    if threading.current_thread() is threading.main_thread():
        # An exception, so that the partial folder is removed.
        signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        report = convert(_folder(args.source), args.target, options)
    except (KeyboardInterrupt, SystemExit) as error:
        for note in getattr(error, "__notes__", ()):
            print(f"vllm-moe-compat: interrupted; {note}.", file=sys.stderr)
        raise
    print(report)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _folder(source: str) -> Path:
    """Return the folder of the checkpoint: a path, or a repository in the hub's cache."""
    from vllm_moe_compat.commands.locate import locate
    from vllm_moe_compat.errors import SettingError

    found = locate(source)
    if found.shard is not None:
        raise SettingError(
            f"{source} is one file, where a checkpoint was expected; name its folder."
        )
    return found.folder


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _layout(args: argparse.Namespace) -> WrittenLayout | None:
    """Return the published layout that is asked for; None for MLX's."""
    from vllm_moe_compat.errors import SettingError

    if args.layout is None and args.fp8 is None:
        if args.scale_dtype is not None:
            raise SettingError("--scale-dtype needs FP8 scales; add --fp8 128x128.")
        return None
    if args.quantize not in (None, "none"):
        raise SettingError(
            f"--quantize {args.quantize} is a packed form of MLX, which has no "
            f"{'--layout' if args.layout else '--fp8'}; leave one of them out."
        )
    from vllm_moe_compat.checkpoint.numbers.fp8_ops import WrittenFp8
    from vllm_moe_compat.rewrite.written_layout import WrittenLayout

    block = _block(args.fp8 or "none")
    if block is None and args.scale_dtype is not None:
        raise SettingError("--scale-dtype needs FP8 scales; add --fp8 128x128.")
    numbers = None if block is None else WrittenFp8(block, args.scale_dtype == "e8m0")
    return WrittenLayout(LAYOUTS[args.layout or "per-expert"], numbers=numbers)


def _block(words: str) -> tuple[int, int] | None:
    from vllm_moe_compat.errors import SettingError

    known = {"none": None, "row": (1, 0), "tensor": (0, 0)}
    if words in known:
        return known[words]
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", words)
    if match is None:
        raise SettingError(
            f"--fp8 is {words!r}, where a block such as 128x128, or row, tensor or none was "
            "expected."
        )
    return int(match[1]), int(match[2])


def _bytes(words: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?I?)B?", words.upper())
    if match is None or match[2] not in _UNITS or not (size := float(match[1])):
        raise argparse.ArgumentTypeError(f"{words!r} is not a size; write 5GB or 500MiB")
    return int(size * _UNITS[match[2]])
