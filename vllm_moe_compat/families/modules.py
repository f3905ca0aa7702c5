"""Which module of mlx-lm loads a config, without importing mlx-lm, which imports MLX.

mlx-lm's own tables are read from its source, so that they are those of the version
that is installed; where none is, the registry answers alone.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_moe_compat.families import registry
from vllm_moe_compat.families.row import Row

PACKAGE = "mlx_lm.models"


@dataclass(frozen=True, slots=True)
class MlxLm:
    """What mlx-lm's source says.

    Attributes:
        version: the one installed; None where there is none.
        folder: of its models.
        by_type: model type → module, where they differ.
        by_architecture: model type and architecture → module.
    """

    version: str | None = None
    folder: Path | None = None
    by_type: Mapping[str, str] = field(default_factory=dict)
    by_architecture: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def module_of(self, config: Mapping[str, Any]) -> str | None:
        """Return the module that mlx-lm picks, as ``mlx_lm.utils._get_classes`` does.

        None where there is no such module.
        """
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
        if self.folder is None or not _is_name(name):
            return None
        return name if (self.folder / f"{name}.py").is_file() else None

    def owner_of(self, module: str) -> str:
        """Return the module that its ``Model`` is from: it may be imported from another."""
        assert self.folder is not None
        tree = ast.parse((self.folder / f"{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            names = node.names if isinstance(node, ast.ImportFrom) and node.level == 1 else ()
            if any((name.asname or name.name) == "Model" for name in names):
                assert isinstance(node, ast.ImportFrom)
                return self.owner_of(node.module or module)
        return module


def _is_name(name: str) -> bool:
    """Whether it can be a module's: no path out of the folder."""
    return 0 < len(name) < 100 and all(c.isalnum() or c in "_-" for c in name)


@cache
def mlx_lm() -> MlxLm:
    """Read the tables of the mlx-lm that is installed; empty ones where none is."""
    try:
        spec = importlib.util.find_spec("mlx_lm")  # of the package itself: imports nothing
        folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else None
        installed = version("mlx-lm") if folder else None
    except (ValueError, StopIteration, PackageNotFoundError):
        return MlxLm()
    if folder is None:
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


def row_to_fix(config: Mapping[str, Any]) -> Row | None:
    """Return the row whose module a config asks for, before anything is changed in it."""
    if config.get("model_file") is not None:
        return None
    return registry.row_of_config(config, mlx_lm().by_type)


def find(config: Mapping[str, Any]) -> tuple[str | None, Row | None]:
    """Return the module that loads a config, once it is in mlx-lm's words, and its row."""
    source = mlx_lm()
    if source.folder is None:
        row = registry.row_of_config(config, {})
        return (row.module if row else None), row
    module = source.module_of(config)
    if module is None:
        return None, None
    row = registry.TRANSFORMS_BY_MODULE.get(f"{PACKAGE}.{source.owner_of(module)}")
    return f"{PACKAGE}.{module}", row
