"""What of a family the environment has: mlx-lm's module, transformers' classes and arithmetic.

With the newest versions nothing is missing. With older ones, as vllm-metal pins them, a family is
left out for what the packages themselves do not have, and the run says so.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import transformers

from parity.family import Family


@cache
def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    (found,) = spec.submodule_search_locations or ()
    return Path(found)


@cache
def _classes() -> frozenset[str]:
    return frozenset(dir(transformers))


def is_installed(module: str) -> bool:
    """Whether mlx-lm has a module."""
    return (folder("mlx_lm") / "models" / f"{module}.py").is_file()


def missing(family: Family) -> str | None:
    """Return what the environment does not have of a family; None if it has it."""
    if not is_installed(family.module):
        return f"mlx-lm has no module {family.module}"
    if gone := [name for name in family.classes if name not in _classes()]:
        return f"transformers has no {gone[0]}"
    base = family.base
    file = folder("transformers") / "models" / base / f"modeling_{base}.py"
    if family.oracle and family.oracle not in file.read_text():
        return f"transformers' {base} has no {family.oracle}"
    return None
