"""Run commands on the demo checkpoint and write docs/transcripts.md from what they say.

Numbers differ from run to run, and so does the order of a server's log; what is
compared, by ``--check``, is the text with its numbers masked.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "transcripts.md"
DEMO, CONVERTED = ".cache/demo", ".cache/demo-8bit"
LINES = 60
"""How many lines of one output are shown."""

_GENERATE = """
import mlx_lm
model, tokenizer = mlx_lm.load("{path}")
print(mlx_lm.generate(model, tokenizer, prompt="Now is better", max_tokens=24))
"""
_APPLY = "import vllm_moe_compat\nvllm_moe_compat.apply()\n"


@dataclass(frozen=True)
class Scene:
    """One command and what is said of it.

    Attributes:
        title: the heading.
        words: a paragraph before the command.
        command: for a shell in the project's root, ``.venv/bin`` on its path.
        shown: the command as the page shows it; itself where empty.
        code: its exit code.
        last: whether only the last line is shown, as of a traceback.
    """

    title: str
    words: str
    command: str
    shown: str = ""
    code: int = 0
    last: bool = False


def _python(code: str) -> tuple[str, str]:
    """Return a Python program as a shell command, and as it is shown."""
    code = code.strip()
    return f"python - <<'END'\n{code}\nEND", f"python - <<'END'\n{code}\nEND"


def scenes() -> list[Scene]:
    stock, shown_stock = _python(_GENERATE.format(path=DEMO))
    ours, shown_ours = _python(_APPLY + _GENERATE.format(path=DEMO))
    after, shown_after = _python(_GENERATE.format(path=CONVERTED))
    tool = "vllm-moe-compat"
    return [
        Scene(
            "The demo",
            "Everything at once: a small mixture-of-experts model in the form of "
            "Qwen3.6-35B-A3B-FP8 is made (or found, as here), served and asked.",
            "scripts/demo",
        ),
        Scene(
            "mlx-lm by itself",
            "What the checkpoint is to mlx-lm without this package; the last line of a long "
            "traceback.",
            stock,
            shown_stock,
            code=1,
            last=True,
        ),
        Scene("inspect", "The same checkpoint, by its headers.", f"{tool} inspect {DEMO}"),
        Scene("mlx-lm with the plugin", "Loaded, and asked to go on.", ours, shown_ours),
        Scene(
            "convert",
            "The way out: an 8-bit checkpoint in MLX's own form.",
            f"{tool} convert {DEMO} {CONVERTED} --quantize 8bit",
        ),
        Scene(
            "mlx-lm by itself, afterwards",
            "The converted checkpoint, without this package.",
            after,
            shown_after,
        ),
        Scene("doctor", "The whole chain, link by link.", f"{tool} doctor"),
    ]


def play(scene: Scene) -> str:
    """Run a scene's command; return what it said.

    Raises:
        SystemExit: with another exit code than expected.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "160",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(
        ["bash", "-c", scene.command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if scene.last else subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode != scene.code:
        sys.exit(f"{scene.command}: exit code {done.returncode}\n{done.stdout}{done.stderr or ''}")
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).replace(f"{ROOT}/", "")
    said = said.replace(str(Path.home()), "~").rstrip("\n")
    lines = [line.rstrip() for line in said.split("\n")]
    if scene.last:
        start = next(i for i, line in enumerate(lines) if line.startswith("ValueError"))
        return lines[start][:300] + (" …" if len(lines[start]) > 300 else "")
    if len(lines) > LINES:
        lines[LINES:] = [f"… ({len(lines) - LINES} more lines)"]
    return "\n".join(lines)


def render() -> str:
    shutil.rmtree(ROOT / CONVERTED, ignore_errors=True)
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm", "vllm", "transformers")
    )
    parts = [
        "# Real transcripts\n\n"
        "<!-- Written by scripts/docs/transcripts; changes made by hand are lost. -->\n\n"
        f"What the commands say, as of {datetime.date.today()}, with {versions}, on Linux with "
        "MLX's CPU build and two cores. The checkpoint is the small one that the demo trains.\n"
    ]
    for scene in scenes():
        print(f"{scene.title} …", file=sys.stderr, flush=True)
        said = play(scene)
        shown = (scene.shown or scene.command).replace("\n", "\n> ")
        parts.append(f"## {scene.title}\n\n{scene.words}\n\n```text\n$ {shown}\n{said}\n```\n")
    return "\n".join(parts)


def masked(page: str) -> list[str]:
    """Return a page's lines, sorted, with numbers, units and padding taken out."""
    lines = (re.sub(r"\d[\d.,:]*|\b[KMG]iB\b|\s+|-+", "#", line) for line in page.split("\n"))
    return sorted(re.sub("#+", "#", line) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/docs/transcripts", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    args = parser.parse_args()
    page = render()
    if not args.check:
        PAGE.write_text(page)
        return
    new = set(masked(page)) ^ set(masked(PAGE.read_text()))
    if new:
        listing = "\n".join(sorted(new))
        sys.exit(f"{PAGE.relative_to(ROOT)} is stale: run scripts/docs/transcripts\n{listing}")


if __name__ == "__main__":
    main()
