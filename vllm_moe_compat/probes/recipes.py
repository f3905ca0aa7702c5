"""Tiny checkpoints, recorded as recipes: names, shapes, a config and expected logits.

``families.json`` holds what transformers computes for them (for the few families that it
does not know, what mlx-lm's own class does), so that a probe needs neither transformers
nor torch. The values are not stored: they follow from a tensor's place in the list, by
numpy's PCG64, whose raw numbers never change. Matrices hold four significant bits in five
binades, so that FP8 with scales that are powers of two loses nothing of them.
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
"""What the recorded logits are the answer to."""
EVERY = 8
"""Of the last token's logits, one in so many is recorded."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The tensors and the config of one checkpoint, and what a model of it computes.

    Attributes:
        tensors: name → shape, in the order that gives the values.
        config: ``config.json``.
        logits: every ``EVERY``-th of the last token's logits.
    """

    tensors: Shapes
    config: Mapping[str, Any]
    logits: tuple[float, ...]

    def values(self) -> Iterator[tuple[str, Array]]:
        """Yield name and values of every tensor."""
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
    """One family as it is published, and as transformers 5 saves it.

    Attributes:
        name: of the family; variants bear a second word.
        module: the last part of the mlx-lm module's path.
        oracle: whose numbers the logits are.
        release: the published form.
        saved: the config that transformers 5 writes, where it is another.
        library: the checkpoint under transformers' own names, where they are others.
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
    """Return what is recorded of an mlx-lm module, given by its import path."""
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
        index: its place.
        name: decides, with the shape, what kind of tensor it is.
        shape: of the result.
    """
    raw = np.asarray(np.random.PCG64(index).random_raw(math.prod(shape))).reshape(shape)
    leaf = name.rpartition(".")[2]
    found: NDArray[np.float64]
    if leaf == "A_log":  # mild decays; with strong ones the states are mostly noise
        found = -(raw % 192).astype(np.float64) / 64
    elif len(shape) > 1 and shape[-1] > 1 and "bias" not in leaf:
        mantissa = (8 + (raw & 7)).astype(np.float64) / 8
        sign = 1 - 2 * ((raw >> 8) & 1).astype(np.float64)
        exponent = (raw >> 16) % 5
        found = sign * np.ldexp(mantissa, -exponent.astype(np.int32))
        found *= 2.0 ** round(-math.log2(shape[-1]) / 2)
    elif "bias" in leaf or leaf == "sinks":
        found = (raw % 33).astype(np.float64) / 64 - 0.25
    else:  # bfloat16 holds these, and not what they are with 1 added
        found = (128 + raw % 64).astype(np.float64) / 256
    return np.asarray(found, np.float32)


def expand(folded: Mapping[str, Sequence[int]]) -> Shapes:
    """Return name → shape of what ``fold`` has folded, in its order."""
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


def fold(tensors: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Write ``x.0.y`` … ``x.3.y`` of one shape as ``x.{0..3}.y``, where all are there."""
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
    """Yield spans whose products are the given tuples: one, or one per first number."""
    spans = [(min(axis), max(axis)) for axis in zip(*numbers, strict=True)]
    if math.prod(b - a + 1 for a, b in spans) == len(numbers):
        yield spans
        return
    for first in sorted({n[0] for n in numbers}):
        rest = [n[1:] for n in numbers if n[0] == first]
        yield from ([(first, first), *box] for box in _boxes(rest))
