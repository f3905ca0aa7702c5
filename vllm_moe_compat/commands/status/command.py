"""Show versions, the state of every module and its workarounds, and what ends them.

Every mapped module loads tiny checkpoints through mlx-lm's own class and through the patched
one, and the logits are compared with recorded ones. A module is active if the patched class
is right, and dormant if mlx-lm's own class is right, too. That takes the better part of a
minute; with ``--quick`` nothing is probed, and no module is reported active.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_moe_compat.families.row import Row
    from vllm_moe_compat.probes.evidence import Examined
    from vllm_moe_compat.probes.status import Status

SCHEMA = "vllm-moe-compat/status/1"
SECONDS = 50.0
"""Time limit for probing; the row that is probed at that moment is finished."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--quick", action="store_true", help="probe nothing")
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="only this module of mlx-lm, in every recorded form; repeatable",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="N",
        help=f"probe no further module after so many seconds (default {SECONDS:g})",
    )
    parser.add_argument(
        "--plugins",
        action="store_true",
        help="load vLLM's other general plugins first; their patches may displace the hooks",
    )


def run(args: argparse.Namespace) -> int:
    """Print the status; return 1 if there is a problem."""
    from vllm_moe_compat.families import registry
    from vllm_moe_compat.load import patching
    from vllm_moe_compat.probes.status import status_of
    from vllm_moe_compat.who_serves import decide, mlx_installed

    rows = [_row(name) for name in args.module] or list(registry.TRANSFORMS_BY_MODULE.values())
    patching.apply()
    if args.plugins:
        _load_plugins()
    examined: Mapping[str, Examined] = {}
    if not args.quick and mlx_installed():
        examined = _probe(rows, bool(args.module), args.seconds)
    status = status_of(examined)
    if args.module:
        wanted = {row.module for row in rows}
        status = dataclasses.replace(
            status, rows=tuple(row for row in status.rows if row.module in wanted)
        )
    server, reason, problem = decide()
    problems = [*status.problems, *filter(None, [problem])]
    if args.format == "json":
        found = as_json(status) | {"problems": problems}
        print(json.dumps(found | {"serves": {"server": server, "reason": reason}}, indent=2))
    else:
        from vllm_moe_compat.commands.status.text import show

        show(status, f"{server}, since {reason}", problems, detailed=bool(args.module))
    return 1 if problems else 0


def as_json(status: Status) -> dict[str, Any]:
    """Return the status as plain data; ``schema`` changes when a field changes its meaning."""
    from vllm_moe_compat import __version__

    return {
        "schema": SCHEMA,
        "version": __version__,
        "headline": status.headline,
        "problems": list(status.problems),
        **{
            key: value
            for key, value in dataclasses.asdict(status).items()
            if key not in ("hooks", "versions")
        },
    }


def _row(name: str) -> Row:
    from vllm_moe_compat.errors import SettingError
    from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE

    module = name if name.startswith("mlx_lm.") else f"mlx_lm.models.{name}"
    if module not in TRANSFORMS_BY_MODULE:
        known = ", ".join(m.rpartition(".")[2] for m in TRANSFORMS_BY_MODULE)
        raise SettingError(f"--module is {name!r}, where one of {known} was expected.")
    return TRANSFORMS_BY_MODULE[module]


def _probe(rows: list[Row], every: bool, seconds: float) -> dict[str, Examined]:
    from vllm_moe_compat import envs
    from vllm_moe_compat.probes.evidence import examine_all

    patched = envs.ENABLED.read() != "0"
    with _progress(len(rows)) as tick:
        return examine_all(rows, patched=patched, every=every, seconds=seconds, progress=tick)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Row], None]]:
    """Show a progress bar if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda row: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="probing", leave=False, file=sys.stderr) as bar:

        def tick(row: Row) -> None:
            bar.set_postfix_str(row.module.rpartition(".")[2], refresh=False)
            bar.update()

        yield tick


def _load_plugins() -> None:
    """Load vLLM's plugins, as every process of a server does."""
    try:
        from vllm.plugins import load_general_plugins
    except ImportError as error:
        from vllm_moe_compat.errors import SettingError

        raise SettingError(f"--plugins needs vLLM, which cannot be imported ({error}).") from error
    load_general_plugins()
