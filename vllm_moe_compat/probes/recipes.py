"""Tiny checkpoints, recorded as recipes: names, shapes, a config and expected logits.

``families.json`` holds the logits that transformers computes (mlx-lm's own class for the few
families without a transformers class), so that a probe needs neither transformers nor torch.
Values are not stored: numpy's PCG64, whose raw numbers never change, generates them from a
tensor's position in the list. Matrices have four significant bits and five binary exponents,
so that FP8 with powers of two as scales represents them exactly.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Shapes = dict[str, tuple[int, ...]]

VOCAB = 96
TOKENS = tuple((7 * i * i + 3 * i + 5) % VOCAB for i in range(37))
"""The input of the recorded logits."""
EVERY = 8
"""Stride of the recorded logits in the last token's logits."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The tensors and the config of one checkpoint, with the logits of its model.

    Attributes:
        tensors: name → shape; the order determines the values.
        config: ``config.json``.
        logits: every ``EVERY``-th of the last token's logits.
    """

    tensors: Shapes
    config: Mapping[str, Any]
    logits: tuple[float, ...]

    def values(self) -> Iterator[tuple[str, Array]]:
        """Yield the name and the values of every tensor."""
        for index, (name, shape) in enumerate(self.tensors.items()):
            yield name, values(index, name, shape)

    def distance(self, found: Array) -> float:
        """Return max|d| / max|expected| of logits ``[L, V]``."""
        expected = np.array(self.logits)
        answer = np.asarray(found, np.float64)[-1, ::EVERY]
        if answer.shape != expected.shape or not np.isfinite(answer).all():
            return math.inf
        return float(np.abs(answer - expected).max() / np.abs(expected).max())


@dataclass(frozen=True, slots=True)
class Family:
    """One family as its authors publish it and as transformers 5 saves it.

    Attributes:
        name: name of the family; variants have a second word.
        module: last part of the mlx-lm module's path.
        oracle: source of the logits: ``transformers`` or ``mlx-lm``.
        release: the published form.
        saved: the config that transformers 5 writes, where it differs.
        library: the checkpoint under transformers' internal names, where they differ.
    """

    name: str
    module: str
    oracle: str
    release: Recipe
    saved: Mapping[str, Any] | None = None
    library: Recipe | None = None


@cache
def families() -> dict[str, Family]:
    """Return the recorded families by name."""
    text = resources.files(__package__).joinpath("families.json").read_text(encoding="utf-8")
    return {name: _family(name, entry) for name, entry in json.loads(text).items()}


def families_of(module: str) -> list[Family]:
    """Return the recorded families of an mlx-lm module, given by its import path."""
    name = module.rpartition(".")[2]
    return [family for family in families().values() if family.module == name]


def _family(name: str, entry: Mapping[str, Any]) -> Family:
    library = entry.get("library")
    return Family(
        name,
        entry["module"],
        entry["oracle"],
        _recipe(entry["release"]),
        entry.get("saved"),
        None if library is None else _recipe(library),
    )


def _recipe(entry: Mapping[str, Any]) -> Recipe:
    return Recipe(expand(entry["tensors"]), entry["config"], tuple(entry["logits"]))


def values(index: int, name: str, shape: Sequence[int]) -> Array:
    """Return the values of the ``index``-th tensor of a recipe.

    Args:
        index: its position in the recipe.
        name: determines, with the shape, the kind of tensor.
        shape: shape of the result.
    """
    raw = np.asarray(np.random.PCG64(index).random_raw(math.prod(shape))).reshape(shape)
    leaf = name.rpartition(".")[2]
    found: NDArray[np.float64]
    if leaf == "A_log":  # slow decay; with fast decay the states are mostly noise
        found = -(raw % 192).astype(np.float64) / 64
    elif len(shape) > 1 and shape[-1] > 1 and "bias" not in leaf:
        mantissa = (8 + (raw & 7)).astype(np.float64) / 8
        sign = 1 - 2 * ((raw >> 8) & 1).astype(np.float64)
        exponent = (raw >> 16) % 5
        found = sign * np.ldexp(mantissa, -exponent.astype(np.int32))
        found *= 2.0 ** round(-math.log2(shape[-1]) / 2)
    elif "bias" in leaf or leaf == "sinks":
        found = (raw % 33).astype(np.float64) / 64 - 0.25
    else:  # exact in bfloat16, but not after adding 1
        found = (128 + raw % 64).astype(np.float64) / 256
    return np.asarray(found, np.float32)


def expand(folded: Mapping[str, Sequence[int]]) -> Shapes:
    """Undo ``fold``: return name → shape in the same order."""
    found: Shapes = {}
    for pattern, shape in folded.items():
        pieces = _RANGE.split(pattern)
        spans = [range(int(a), int(b) + 1) for a, b in zip(pieces[1::3], pieces[2::3], strict=True)]
        for numbers in itertools.product(*spans):
            name = "".join(
                piece + str(number)
                for piece, number in itertools.zip_longest(pieces[::3], numbers, fillvalue="")
            )
            found[name] = tuple(shape)
    return found


def fold_shapes(tensors: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Fold complete runs of one shape: ``x.0.y`` … ``x.3.y`` become ``x.{0..3}.y``."""
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tuple(shape))
        numbers = tuple(map(int, re.findall(r"(?<=\.)\d+(?=\.)", name)))
        groups.setdefault(key, []).append(numbers)
    found: dict[str, list[int]] = {}
    for (pattern, shape), each in groups.items():
        for box in _boxes(each):
            spans = [f"{{{a}..{b}}}" if a != b else str(a) for a, b in box]
            pieces = itertools.zip_longest(pattern.split("*"), spans, fillvalue="")
            found["".join(itertools.chain(*pieces))] = list(shape)
    return found


def _boxes(numbers: list[tuple[int, ...]]) -> Iterator[list[tuple[int, int]]]:
    """Yield boxes that cover the tuples exactly: one, or one or more per first number."""
    spans = [(min(axis), max(axis)) for axis in zip(*numbers, strict=True)]
    if math.prod(b - a + 1 for a, b in spans) == len(numbers):
        yield spans
        return
    for first in sorted({n[0] for n in numbers}):
        rest = [n[1:] for n in numbers if n[0] == first]
        yield from ([(first, first), *box] for box in _boxes(rest))
