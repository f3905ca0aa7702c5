"""Record docs/data/parity.json: the results of the parity tests, with and without the plugin.

Only verdicts and short reasons are kept, which do not vary between machines.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDING = ROOT / "docs" / "data" / "parity.json"

# Reason on the page → beginnings of mlx-lm's error messages.
_REASONS = {
    "tensors": ("ValueError: Received", "ValueError: Missing"),
    "format": ("ValueError: unsupported compressed", "ValueError: Unsupported modelopt"),
    "config": (
        "ValueError: Model type",
        "ValueError: Unknown layer type",
        "TypeError: ModelArgs",
        "TypeError: TextArgs",
        "AttributeError: 'NoneType'",
    ),
}


def read() -> dict[str, Any]:
    """Return the recording."""
    found: dict[str, Any] = json.loads(RECORDING.read_text())
    return found


def record() -> None:
    """Run the parity tests and write the recording.

    Raises:
        SystemExit: a test failed; the recording is not changed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cells.json")
        command = [sys.executable, "-m", "pytest", "-q", "tests/parity/test_parity.py"]
        done = subprocess.run([*command, "--record-parity", str(path)], cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit("Nothing was recorded, since the parity tests did not pass.")
        cells = json.loads(path.read_text())
    RECORDING.parent.mkdir(exist_ok=True)
    RECORDING.write_text(_as_lines(condense(cells)))


def condense(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Build the recording from the cells of the parity tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    from parity.families import FAMILIES, MOE
    from parity.forms import FORMS
    from parity.variants import VARIANTS

    moe, variants = ({f.name for f in group} for group in (MOE, VARIANTS))
    families: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        own = {cell["form"]: cell for cell in cells if cell["family"] == name}
        families[name] = {
            "module": family.module,
            "class": family.classes[1],
            "group": "variant" if name in variants else "moe" if name in moe else "dense",
            "note": family.note,
            "cells": {
                form.name: [verdict(own[form.name]), verdict(own[form.name], "stock_")]
                for form in FORMS
                if form.name in own
            },
        }
    return {
        "forms": [form.name for form in FORMS],
        "families": families,
        "unmapped": unmapped(),
    }


def verdict(cell: dict[str, Any], prefix: str = "") -> str:
    """Return ``right``, ``wrong``, ``fails`` (when run) or ``refused: `` and a reason."""
    word, why = cell[f"{prefix}verdict"], cell[f"{prefix}why"]
    if word == "wrong" and why.startswith("fails when run"):
        return "fails"
    if word != "refused":
        return str(word)
    if not prefix:
        return f"refused: {why}"
    for reason, beginnings in _REASONS.items():
        if why.startswith(beginnings):
            return f"refused: {reason}"
    return "refused: error"


def unmapped() -> list[str]:
    """Return mlx-lm's models without a row."""
    import importlib
    import pkgutil

    import mlx_lm.models

    from vllm_moe_compat.families.registry import row_for

    found = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        try:
            model = getattr(importlib.import_module(f"mlx_lm.models.{module.name}"), "Model", None)
        except (ImportError, SystemExit):  # olmo exits if its package is not installed
            found.append(module.name)
            continue
        if model is not None and row_for(model) is None:
            found.append(module.name)
    return sorted(found, key=str.lower)


def _as_lines(recording: dict[str, Any]) -> str:
    """One line per family, so that a change shows as one."""
    families = [
        f"  {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}"
        for name, entry in recording["families"].items()
    ]
    rest = [
        f" {json.dumps(key)}: {json.dumps(value)},"
        for key, value in recording.items()
        if key != "families"
    ]
    return "\n".join(["{", *rest, ' "families": {', ",\n".join(families), " }", "}", ""])
