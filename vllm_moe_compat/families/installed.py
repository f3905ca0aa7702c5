"""The sources of the installed mlx-lm's modules, read without importing it.

Rows are written for the newest mlx-lm of the tested range. Where an older module lacks
something, its source says so, whatever its version: a row adds what is missing by ``older``.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Older:
    """Something that a module lacks, and that its row makes up for.

    Attributes:
        module: name of the module.
        sign: text of the source of modules that have it.
        why: what the module does without it.
    """

    module: str
    sign: str
    why: str

    @property
    def is_lacking(self) -> bool:
        """Whether the installed module lacks it."""
        return lacks(self.module, self.sign)


OLDER: list[Older] = []
"""All that rows make up for in older modules, whether or not the installed ones lack it."""


@cache
def package_folder() -> Path | None:
    """Return the folder of the installed mlx-lm; None without it."""
    try:
        spec = importlib.util.find_spec("mlx_lm")  # of the package itself: imports nothing
    except ValueError:
        return None
    folders = (spec and spec.submodule_search_locations) or ()
    return next(map(Path, folders), None)


@cache
def lacks(module: str, sign: str) -> bool:
    """Whether a module is installed and its source lacks a text."""
    folder = package_folder()
    source = None if folder is None else folder / "models" / f"{module}.py"
    return source is not None and source.is_file() and sign not in source.read_text("utf-8")


def older(module: str, sign: str, why: str, *values: T) -> tuple[T, ...]:
    """Return the values for a module that lacks something; none for the others.

    Args:
        module: name of the module.
        sign: text of the source of modules that have it.
        why: what the module does without it.
        *values: fixes, translations, names: what a row then has besides.
    """
    OLDER.append(Older(module, sign, why))
    return values if lacks(module, sign) else ()
