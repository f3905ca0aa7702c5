"""A ``ForwardFix``: one kind of setting that mlx-lm's modules ignore, and how it is put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Settings: TypeAlias = Mapping[str, Any]
"""The language model's settings as transformers' config class resolves them."""


@dataclass(frozen=True, slots=True)
class ForwardFix:
    """A setting that a module ignores, put into an instance of it.

    Attributes:
        id: short name, for tables and messages: ``sliding-window``.
        why: what the module does without it.
        settings: keys of the settings that are put in.
        needed: takes the settings; returns what will be put in, in words, or None if the module
            computes the right thing by itself. Raises ``UnsupportedCheckpointError`` if a value
            cannot be put in.
        apply: takes the model and the settings; changes the instance.
        prepare: takes the config's section for the language model and the settings; changes the
            section so that mlx-lm can build the module. None if it can.
        slight: whether the difference is about that of rounding, so that the module counts as
            right without the fix.
    """

    id: str
    why: str
    settings: tuple[str, ...]
    needed: Callable[[Settings], str | None]
    apply: Callable[[Any, Settings], None]
    prepare: Callable[[dict[str, Any], Settings], None] | None = None
    slight: bool = False


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """A setting that a module ignores, and whose effect begins at some length.

    Attributes:
        id: short name, for tables and messages.
        why: what the module computes beyond that length, in words that complete "since".
        settings: keys of the settings that decide.
        longest: takes the settings; returns the number of tokens up to which the module computes
            the right thing, or None if it does at any length.
    """

    id: str
    why: str
    settings: tuple[str, ...]
    longest: Callable[[Settings], int | None]


def become(part: Any, corrected: Callable[[Any], type]) -> None:
    """Give one instance the corrected class; idempotent for each correction.

    Args:
        part: the instance.
        corrected: takes the instance's class, returns the corrected one; a function of a module.
    """
    done = getattr(type(part), "corrections", ())
    if corrected not in done:
        part.__class__ = corrected(type(part))
        type(part).corrections = (*done, corrected)


def named(part: type, original: type) -> type:
    """Give the corrected class the original's name and module."""
    part.__name__, part.__qualname__ = original.__name__, original.__qualname__
    part.__module__ = original.__module__
    return part
