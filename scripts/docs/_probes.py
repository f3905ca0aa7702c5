"""Record the expected logits of the probes; see the wrapper beside this file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "vllm_moe_compat" / "probes" / "families.json"


def render(entries: dict[str, Any]) -> str:
    """Return the file: one line per family."""
    lines = (
        f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}"
        for name, entry in entries.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    os.environ["VLLM_MOE_COMPAT_DTYPE"] = "float32"
    sys.path.insert(0, str(ROOT / "tests"))
    import transformers

    from parity import recorded

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = (*recorded.NAMES, *recorded.OWN)
    FILE.write_text(render({name: recorded.entry(name) for name in names}))


if __name__ == "__main__":
    main()
