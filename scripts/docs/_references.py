"""Where a workaround is said and referred to: what to delete when it goes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from vllm_moe_compat.families import workarounds
from vllm_moe_compat.families.row import Row, Workaround

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_moe_compat"
_DEFAULTS = {f.name for f in fields(Row)}


@dataclass(frozen=True)
class Place:
    """Some lines of a file, from column to column, and what is there in words."""

    path: str
    start: tuple[int, int]
    end: tuple[int, int]
    text: str

    @property
    def lines(self) -> str:
        first, last = self.start[0], self.end[0]
        return f"{first}" if first == last else f"{first}-{last}"


def named() -> dict[str, Workaround]:
    """Return every workaround by the name that the source gives it."""
    return {n: v for n, v in vars(workarounds).items() if isinstance(v, Workaround)}


def name_of(workaround: Workaround) -> str:
    return next(name for name, known in named().items() if known.id == workaround.id)


def places(name: str, root: Path = ROOT) -> list[Place]:
    """Return what to delete of a workaround: the object, its references, what it calls."""
    found = [*_object(name, root), *_uses(name, root)]
    registry, tree = f"{PACKAGE}/registry.py", _parse(root, f"{PACKAGE}/registry.py")
    called = set()
    for keyword in _keywords(name, tree):
        found.append(_place(registry, keyword, f"`{ast.unparse(keyword)}`"))
        if keyword.arg == "around" and isinstance(keyword.value, ast.Attribute):
            called.add(keyword.value.attr)
    for function in sorted(called):
        if not _still_called(function, name, tree):
            found += _functions(function, root)
    return found


def _parse(root: Path, path: str) -> ast.Module:
    return _tree((root / path).read_text())


@cache
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


def _place(path: str, node: ast.AST, text: str) -> Place:
    start = (node.lineno, node.col_offset)  # type: ignore[attr-defined]
    end = (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
    return Place(path, start, end, text)


def _object(name: str, root: Path) -> Iterator[Place]:
    path = f"{PACKAGE}/workarounds.py"
    for node in _parse(root, path).body:
        if isinstance(node, ast.Assign) and _is_name(node.targets[0], name):
            yield _place(path, node, f"`{name} = Workaround(…)`")


def _uses(name: str, root: Path) -> Iterator[Place]:
    for path in _python(PACKAGE, name, root):
        for node in _references(name, _parse(root, path)):
            yield _place(path, node, f"`{ast.unparse(node)}`")


def _python(folder: str, name: str, root: Path) -> list[str]:
    """Return the files that may refer to a workaround."""
    files = sorted((root / folder).rglob("*.py"))
    return [f.relative_to(root).as_posix() for f in files if f"w.{name}" in f.read_text()]


def named_in(name: str, root: Path = ROOT) -> list[str]:
    """Return the tests that name a workaround, and want a look when it goes."""
    return [p for p in _python("tests", name, root) if any(_references(name, _parse(root, p)))]


def lines(name: str, root: Path = ROOT) -> list[str]:
    """Return what ``places`` finds, a line for each text in a file."""
    folded: dict[tuple[str, str], list[str]] = {}
    for place in places(name, root):
        folded.setdefault((place.path, place.text), []).append(place.lines)
    return [f"{path}:{','.join(found)}: {text}" for (path, text), found in folded.items()]


def _references(name: str, tree: ast.AST) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == name and _is_name(node.value, "w"):
            yield node


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _keywords(name: str, tree: ast.Module) -> Iterator[ast.keyword]:
    """Yield the arguments of rows that are there for the workaround alone."""
    removed = {field for field, value in named()[name].then if field in _DEFAULTS and not value}
    for call in _rows(name, tree):
        yield from (keyword for keyword in call.keywords if keyword.arg in removed)


def _rows(name: str, tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        direct = isinstance(node, ast.Call) and any(
            isinstance(a, ast.Attribute) and a.attr == name for a in node.args
        )
        if direct:
            yield node  # type: ignore[misc]


def _still_called(function: str, name: str, tree: ast.Module) -> bool:
    """Whether a row without the workaround calls the function too."""
    users = [n for n in ast.walk(tree) if isinstance(n, ast.keyword) and _calls(n.value, function)]
    return len(users) > sum(_calls(k.value, function) for k in _keywords(name, tree))


def _calls(node: ast.AST, function: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == function


def _functions(function: str, root: Path) -> Iterator[Place]:
    """Yield the function of repairs.py, and those that only it calls."""
    path = f"{PACKAGE}/repairs.py"
    known = {n.name: n for n in _parse(root, path).body if isinstance(n, ast.FunctionDef)}
    gone = [function]
    for name in gone:
        for other in known:
            users = {n for n, body in known.items() if n != other and _mentions(body, other)}
            if other.startswith("_") and other not in gone and users and users <= {*gone}:
                gone.append(other)
        first = known[name]
        start = min([first.lineno, *(d.lineno for d in first.decorator_list)])
        text = f"`def {name}(…)`"
        yield Place(path, (start, 0), (first.end_lineno, first.end_col_offset), text)  # type: ignore[arg-type]


def _mentions(node: ast.AST, name: str) -> bool:
    return any(_is_name(found, name) for found in ast.walk(node))


def remove(name: str, root: Path) -> list[Path]:
    """Delete a workaround from the sources below ``root``; return the files changed.

    What is left empty or unused, such as an import, is for ruff to find.
    """
    by_file: dict[str, list[Place]] = {}
    for place in places(name, root):
        by_file.setdefault(place.path, []).append(place)
    for path, found in by_file.items():
        lines = (root / path).read_text().splitlines(keepends=True)
        for place in sorted(found, key=lambda p: p.start, reverse=True):
            _cut(lines, place)
        (root / path).write_text("".join(lines))
    return [root / path for path in by_file]


def _cut(lines: list[str], place: Place) -> None:
    """Take a node out, with the comma behind it and the line if nothing else is on it."""
    (first, start), (last, end) = place.start, place.end
    head = lines[first - 1].encode()[:start].decode()
    tail = lines[last - 1].encode()[end:].decode().removeprefix(",")
    if not head.strip() or not tail.strip():
        tail = tail.lstrip(" ")
    kept = head + (tail.removeprefix(" ") if head.endswith((" ", "(")) else tail)
    lines[first - 1 : last] = [kept] if kept.strip() else []
