"""Find layers in tensor names, and fold many names into one for messages.

``fold`` turns thirty thousand names into ``layers.0…39.mlp.experts.0…255.*``, so a message about
them stays one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LAYER = re.compile(r"(?:^|(?<=\.))(?:layers|blocks|h)\.([0-9]{1,9})(?=\.|$)")
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.|$)")
_HOLE = "\0"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer in a tensor's name.

    Attributes:
        path: the name up to the layer's number: ``model.layers.3``.
        number: the layer's number.
    """

    path: str
    number: int

    @property
    def prefix(self) -> str:
        """The path without the number: ``model.layers.``."""
        return self.path[: self.path.rindex(".") + 1]


def layer_of(name: str) -> Layer | None:
    """Return the outermost layer of a tensor or module; None outside of layers.

    Layers are numbered under ``layers``, ``blocks`` or ``h``, not under ``sublayers``.
    """
    match = _LAYER.search(name)
    return Layer(name[: match.end()], int(match[1])) if match else None


def fold_numbers(numbers: Iterable[int]) -> str:
    """Write integers as runs: ``{0, 1, 2, 5}`` is ``0…2,5``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}…{b}" for a, b in runs)


def fold(names: Iterable[str]) -> str:
    """Write tensor names as a few patterns, with the numbers between dots as runs.

    A pattern stands for exactly the given names. If their numbers do not form a full grid
    (layer 0 lacks expert 3, layer 1 lacks expert 5), the names are listed. At most three
    patterns are shown; the others are counted.
    """
    patterns: dict[str, list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):
        numbers = tuple(int(n) for n in _NUMBER.findall(name))
        patterns.setdefault(_NUMBER.sub(_HOLE, name), []).append(numbers)

    shown: list[str] = []
    hidden = 0
    for pattern, found in patterns.items():
        columns = [set(column) for column in zip(*found, strict=True)]
        grid = 1
        for column in columns:
            grid *= len(column)
        for numbers in found if grid != len(found) else [()]:
            if len(shown) == _SHOWN:
                hidden += 1 if numbers else grid
                continue
            parts = map(str, numbers) if numbers else map(fold_numbers, columns)
            shown.append(_fill(pattern, parts))
    return ", ".join(shown) + (f" and {hidden} more" if hidden else "")


def _fill(pattern: str, parts: Iterable[str]) -> str:
    """Fill the pattern's holes; unprintable characters become question marks."""
    filled = ""
    rest = iter(parts)
    for character in pattern:
        if character == _HOLE:
            filled += next(rest, "?")
        else:
            filled += character if character.isprintable() else "?"
    return filled
