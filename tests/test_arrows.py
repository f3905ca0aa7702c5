"""Imports between the package's rooms go one way, and only ``backend/vllm`` imports vllm.

All imports count: those inside functions and under ``TYPE_CHECKING`` too. They are read with
``ast``, so nothing is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_moe_compat

PACKAGE = "vllm_moe_compat"
ROOT = Path(vllm_moe_compat.__file__).parent

BASE = {"_version", "dtypes", "errors", "log", "versions"}
BELOW_LOAD = BASE | {"envs", "checkpoint", "families", "plan", "execute"}
# Room → rooms that it may import. ``.`` is the package itself, with its public functions.
MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    "envs": BASE,
    "other_platforms": BASE,
    "who_serves": BASE | {"envs", "other_platforms"},
    "checkpoint": BASE | {"envs"},
    "families": BASE | {"envs", "checkpoint"},
    "plan": BASE | {"envs", "checkpoint", "families"},
    "execute": BASE | {"envs", "checkpoint", "families", "plan"},
    "expert_cache": BELOW_LOAD,
    "ranks": BELOW_LOAD,
    "load": BELOW_LOAD | {"expert_cache", "ranks"},
    "rewrite": BELOW_LOAD,
    "probes": BELOW_LOAD | {"expert_cache", "load", "rewrite"},
    "backend": BELOW_LOAD | {"expert_cache", "ranks", "load", "who_serves"},
    ".": BASE | {"load", "probes"},
    "plugin": BASE | {"envs", "who_serves", "load", "backend"},
    "__main__": {"commands"},
}
# May import everything.
TOP = {"commands", "demo"}
ROOT_MODULES = {
    *("__init__", "__main__", "_version", "plugin", "who_serves", "other_platforms"),
    *("errors", "envs", "log", "versions", "dtypes"),
}
# Package of the backend → packages of the backend that it may import.
BACKEND: dict[str, set[str]] = {
    "": set(),
    "pages": set(),
    "model": {"pages"},
    "step": {"pages", "model"},
    "vllm": {"pages", "model", "step"},
}
# Modules outside ``backend/vllm`` that import vllm, each inside one function.
IMPORT_VLLM = {
    # Serves a checkpoint, in a subprocess of ``doctor``.
    "vllm_moe_compat.commands.doctor.steps",
    # ``status --plugins`` has vLLM load its plugins, on request.
    "vllm_moe_compat.commands.status.command",
}


def name_of(path: Path, root: Path = ROOT) -> str:
    parts = (PACKAGE, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(source: str) -> Iterator[str]:
    """Names that the code imports: modules, and ``module.name`` where the name is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not read here"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def own_imports(source: str) -> set[str]:
    return {name for name in imported(source) if name in MODULES}


IMPORTS = {
    name: own_imports(path.read_text(encoding="utf-8")) - {name} for name, path in MODULES.items()
}
ARROWS = sorted((source, target) for source, targets in IMPORTS.items() for target in targets)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "."


def allowed(source: str, target: str) -> bool:
    inside, outside = room(source), room(target)
    if inside == outside or inside in TOP:
        return True
    return outside in MAY_IMPORT.get(inside, set())


def test_the_reader_sees_every_kind_of_import() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "import vllm_moe_compat.log as other\n"
        "if TYPE_CHECKING:\n"
        "    from vllm_moe_compat import errors\n"
        "def lazy():\n"
        "    from vllm_moe_compat.envs import BACKEND\n"
        "    from vllm_moe_compat import applied\n"
        "    import vllm.envs\n"
    )
    assert own_imports(source) == {
        *("vllm_moe_compat", "vllm_moe_compat.log"),
        *("vllm_moe_compat.errors", "vllm_moe_compat.envs"),
    }
    assert "vllm.envs" in set(imported(source))
    assert len(MODULES) > 100
    assert len(ARROWS) > 300


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES} <= {*MAY_IMPORT, *TOP}


@pytest.mark.parametrize("inside", sorted({room(name) for name in MODULES} - TOP))
def test_arrows_between_rooms_go_one_way(inside: str) -> None:
    wrong = {(a, b) for a, b in ARROWS if room(a) == inside and not allowed(a, b)}
    assert not wrong


def test_arrows_inside_the_backend_go_one_way() -> None:
    def part(module: str) -> str | None:
        names = module.split(".")
        return (names[2] if len(names) > 2 else "") if room(module) == "backend" else None

    wrong = []
    for source, target in ARROWS:
        inside, outside = part(source), part(target)
        if inside is None or outside is None or inside == outside:
            continue
        if outside not in BACKEND[inside]:
            wrong.append((source, target))
    assert not wrong


def test_modules_import_each_other_in_no_circle() -> None:
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for target in sorted(IMPORTS[module]):
            visit(target)
        path.pop()
        done.add(module)

    for module in IMPORTS:
        visit(module)


def test_only_the_vllm_folder_of_the_backend_imports_vllm() -> None:
    inside = f"{PACKAGE}.backend.vllm"
    found = {
        module
        for module, path in MODULES.items()
        if any(
            name.partition(".")[0] == "vllm" for name in imported(path.read_text(encoding="utf-8"))
        )
    }
    assert {module for module in found if not module.startswith(inside)} == IMPORT_VLLM
    assert any(module.startswith(inside) for module in found)


def test_exceptions_import_vllm_inside_a_function() -> None:
    for module in IMPORT_VLLM:
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = set(imported(ast.unparse(ast.Module(top, [])))) if top else set()
        assert not {name for name in names if name.partition(".")[0] == "vllm"}, module


def test_the_root_holds_entry_points_and_what_every_room_uses() -> None:
    found = {path.stem for path in ROOT.glob("*.py")}
    assert found <= ROOT_MODULES
