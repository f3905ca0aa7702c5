"""``python -m vllm_moe_compat.demo [PATH]``: build the demo checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_moe_compat.demo import build, default_path


def main() -> int:
    """Build, with progress on stderr; print the folder on stdout."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_moe_compat.demo",
        description="Build a small FP8 MoE checkpoint in the form of Qwen3.6-35B-A3B-FP8.",
    )
    parser.add_argument(
        "path", nargs="?", type=Path, default=default_path(), help="folder (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=160, help="training steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    arguments = parser.parse_args()
    try:
        checkpoint = build(
            arguments.path,
            steps=arguments.steps,
            seed=arguments.seed,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(checkpoint.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
