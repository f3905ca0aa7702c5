"""The arguments of mlx-lm's modules: the keys of ``config.json`` that a module reads.

They are read from mlx-lm's source, since importing mlx-lm imports MLX. A module has a class
``ModelArgs``; the module of a multimodal model reads its ``text_config`` into a second class.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vllm_moe_compat.families.modules import PACKAGE, mlx_lm

UNKNOWN = object()
"""The default of an argument whose default is not a literal."""
REQUIRED = object()
"""The default of an argument that has none."""

Defaults = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a module, each with its default.

    Attributes:
        whole: those read at the top level of a config that nests the language model; empty for
            a module that reads no section.
        text: those of the language model.
        either: whether the module reads the language model's in a section if there is one, and
            at the top level if not.
    """

    whole: Defaults = field(default_factory=dict)
    text: Defaults = field(default_factory=dict)
    either: bool = False


def arguments(module: str, text_type: Any = None) -> Arguments | None:
    """Return the arguments of a module; None if its source is not known.

    Args:
        module: its import path.
        text_type: ``model_type`` of the config's section for the language model, by which some
            modules choose among several.
    """
    folder = mlx_lm().folder
    package, _, name = module.rpartition(".")
    if folder is None or package != PACKAGE or not (folder / f"{name}.py").is_file():
        return None
    return _arguments(folder, name, text_type if isinstance(text_type, str) else None)


@cache
def _arguments(folder: Path, name: str, text_type: str | None) -> Arguments | None:
    source = _Source.read(folder, name)
    whole = source.defaults("ModelArgs")
    if whole is None:
        return None
    from_dict = source.method("ModelArgs", "from_dict")
    either = from_dict is not None and "text_config" in ast.unparse(from_dict)
    if "text_config" not in whole:
        return Arguments({}, whole, either)
    text = _text_arguments(folder, source, text_type)
    return None if text is None else Arguments(whole, text, either)


def _text_arguments(folder: Path, source: _Source, text_type: str | None) -> Defaults | None:
    """Return the arguments that the module or its parent makes of ``text_config``."""
    readers = source.readers()
    for owner, cls in readers:
        if owner is not None and owner == text_type:
            return _Source.read(folder, owner).defaults(cls)
    if readers:
        owner, cls = readers[-1]
        return (source if owner is None else _Source.read(folder, owner)).defaults(cls)
    parent = source.imported.get("Model") or next(
        (found for local, found in source.imported.items() if found[1] == "Model"), None
    )
    return (
        None if parent is None else _text_arguments(folder, _Source.read(folder, parent[0]), None)
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """The source of one module.

    Attributes:
        folder: of the modules.
        tree: the parsed source.
        imported: local name → module and its name there; the latter is empty for a module.
    """

    folder: Path
    tree: ast.Module
    imported: Mapping[str, tuple[str, str]]

    @classmethod
    def read(cls, folder: Path, name: str) -> _Source:
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        imported: dict[str, tuple[str, str]] = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for alias in node.names:
                    local = alias.asname or alias.name
                    own = (alias.name, "") if node.module is None else (node.module, alias.name)
                    imported[local] = own
        return cls(folder, tree, imported)

    def classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}

    def method(self, cls: str, name: str) -> ast.FunctionDef | None:
        node = self.classes().get(cls)
        methods = node.body if node is not None else []
        return next((m for m in methods if isinstance(m, ast.FunctionDef) and m.name == name), None)

    def defaults(self, cls: str) -> Defaults | None:
        """Return the fields of a dataclass, inherited ones included; None without one."""
        node = self.classes().get(cls)
        if node is None:
            owner, name = self.imported.get(cls, ("", ""))
            return _Source.read(self.folder, owner).defaults(name) if name else None
        found: dict[str, Any] = {}
        for base in node.bases:
            found |= self._of(base)
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                found[part.target.id] = REQUIRED if part.value is None else _literal(part.value)
        return found

    def _of(self, base: ast.expr) -> Defaults:
        if isinstance(base, ast.Name) and base.id != "BaseModelArgs":
            return self.defaults(base.id) or {}
        if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
            owner = self.imported.get(base.value.id, ("", ""))[0]
            return (_Source.read(self.folder, owner).defaults(base.attr) if owner else None) or {}
        return {}

    def readers(self) -> list[tuple[str | None, str]]:
        """Return the classes that ``text_config`` is read into, with their modules, in order."""
        found: list[tuple[str | None, str]] = []
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr != "from_dict" or len(node.args) != 1:
                continue
            if not ast.unparse(node.args[0]).endswith(".text_config"):
                continue
            owner = node.func.value
            if isinstance(owner, ast.Name):
                found.append((None, owner.id))
            elif isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name):
                found.append((self.imported.get(owner.value.id, ("", ""))[0], owner.attr))
        return found


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        return UNKNOWN
