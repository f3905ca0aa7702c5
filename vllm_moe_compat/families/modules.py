"""Find the mlx-lm module that loads a config, and its registry row.

The answer follows mlx-lm's own tables. They are read from its source, since importing mlx-lm
imports MLX; if mlx-lm is imported already, its live tables are used. Without mlx-lm the
registry's model types are used.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_moe_compat.families import registry
from vllm_moe_compat.families.installed import package_folder
from vllm_moe_compat.families.row import GLU, W123, Row

PACKAGE = "mlx_lm.models"
OWN_CODE = "it is the checkpoint's own code"
UNMAPPED = "it is not in the map of supported modules"


@dataclass(frozen=True, slots=True)
class FoundModule:
    """The module that loads a checkpoint.

    Attributes:
        path: import path; empty if mlx-lm has no such module.
        row: registry row, or None.
        reason: the reason for a missing row; else empty.
    """

    path: str
    row: Row | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MlxLm:
    """The tables of the installed mlx-lm.

    Attributes:
        version: installed version, or None.
        folder: folder of its model modules, or None.
        by_type: model type → module, if their names differ.
        by_architecture: model type and architecture → module.
    """

    version: str | None = None
    folder: Path | None = None
    by_type: Mapping[str, str] = field(default_factory=dict)
    by_architecture: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def module_of(self, config: Mapping[str, Any]) -> str | None:
        """Return the module that ``mlx_lm.utils._get_classes`` picks, or None."""
        kind = config.get("model_type")
        if not isinstance(kind, str):
            return None
        architectures = config.get("architectures") or ()
        if isinstance(architectures, str):
            architectures = (architectures,)
        name = self.by_type.get(kind, kind)
        for architecture in architectures if isinstance(architectures, list | tuple) else ():
            if isinstance(architecture, str) and (kind, architecture) in self.by_architecture:
                name = self.by_architecture[kind, architecture]
                break
        if f"{PACKAGE}.{name}" in sys.modules:
            return name
        if self.folder is None or not _is_name(name):
            return None
        return name if (self.folder / f"{name}.py").is_file() else None

    def words_of(self, row: Row) -> frozenset[str]:
        """Return the words of the names that a row's module knows; empty without mlx-lm."""
        if self.folder is None:
            return frozenset()
        source = self.folder / f"{row.module.rpartition('.')[2]}.py"
        if not source.is_file():
            return frozenset()
        own = [text for pair in row.renames for text in pair]
        own += [text for end, parts in row.splits for text in (end, *parts)]
        if row.moe is not None:
            own += [*row.moe.spelling, *row.moe.sources, *GLU, *W123]
            own += ["gate_up_proj"]
        return words_of(source) | {word for text in own for word in re.findall(r"\w+", text)}

    def row_of(self, module: str) -> Row | None:
        """Return the row that covers the ``sanitize`` of a module's ``Model``.

        A class that inherits ``sanitize`` is covered by its parent's row; a class that overrides
        it needs a row of its own.
        """
        live = getattr(sys.modules.get(f"{PACKAGE}.{module}"), "Model", None)
        if isinstance(live, type):
            return registry.row_for(live)
        row = registry.TRANSFORMS_BY_MODULE.get(f"{PACKAGE}.{module}")
        if self.folder is None:
            return row
        defined, parent = _model_of(self.folder / f"{module}.py")
        if row is not None and defined:
            return row
        return self.row_of(parent) if parent is not None else None


@cache
def _model_of(source: Path) -> tuple[bool, str | None]:
    """Return whether a module defines ``Model``, and the module that it takes ``sanitize`` from.

    The latter is the sibling module of the imported class or base class; None if the class
    defines ``sanitize`` or inherits none.
    """
    imported: dict[str, str] = {}
    base: ast.expr | None = ast.Name("Model")
    defined = False
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in node.names:
                imported[name.asname or name.name] = node.module or name.name
        elif isinstance(node, ast.ClassDef) and node.name == "Model":
            defined = True
            methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            base = node.bases[0] if node.bases and "sanitize" not in methods else None
    if isinstance(base, ast.Attribute):
        base = base.value
    return defined, imported.get(base.id) if isinstance(base, ast.Name) else None


@cache
def words_of(source: Path) -> frozenset[str]:
    """Return the words that occur in the names of a module's weights.

    They are the attributes that the source of the module, or of a sibling that it imports,
    assigns, and the words of its strings. A superset: to tell names that are foreign.
    """
    words: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            words.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.update(re.findall(r"\w+", node.value))
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in (node.module,) if node.module else [n.name for n in node.names]:
                if name is not None and (sibling := source.with_name(f"{name}.py")).is_file():
                    words |= words_of(sibling)
    return frozenset(words)


def _is_name(name: str) -> bool:
    """Whether the string can be a module's name; a path out of the folder cannot."""
    return 0 < len(name) < 100 and all(c.isalnum() or c in "_-" for c in name)


def mlx_lm() -> MlxLm:
    """Return the tables of the installed mlx-lm; empty without mlx-lm."""
    source = _from_source()
    utils = sys.modules.get("mlx_lm.utils")
    if utils is None:
        return source
    return replace(
        source,
        by_type=getattr(utils, "MODEL_REMAPPING", source.by_type),
        by_architecture=getattr(utils, "MODEL_ARCHITECTURE_REMAPPING", source.by_architecture),
    )


@cache
def _from_source() -> MlxLm:
    folder = package_folder()
    if folder is None:
        return MlxLm()
    try:
        installed = version("mlx-lm")
    except PackageNotFoundError:
        return MlxLm()
    tables: dict[str, Any] = {}
    for node in ast.parse((folder / "utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING"):
                tables[name] = ast.literal_eval(node.value)
    return MlxLm(
        installed,
        folder / "models",
        tables.get("MODEL_REMAPPING", {}),
        tables.get("MODEL_ARCHITECTURE_REMAPPING", {}),
    )


def row_of_config(config: Mapping[str, Any]) -> Row | None:
    """Return the row for a config whose keys are not translated yet, or None."""
    if config.get("model_file") is not None:
        return None
    return registry.row_of_model_type(config, mlx_lm().by_type)


def find(config: Mapping[str, Any]) -> FoundModule:
    """Return the module that loads a config whose keys are translated for mlx-lm."""
    if config.get("model_file") is not None:
        return FoundModule(str(config["model_file"]), None, OWN_CODE)
    source = mlx_lm()
    if source.folder is None:
        row = registry.row_of_model_type(config, {})
        return FoundModule("", None, UNMAPPED) if row is None else FoundModule(row.module, row)
    module = source.module_of(config)
    if module is None:
        return FoundModule("", None, "mlx-lm has no module for it")
    row = source.row_of(module)
    return FoundModule(f"{PACKAGE}.{module}", row, "" if row is not None else UNMAPPED)
